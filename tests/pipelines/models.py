"""Tiny models of each family with their tokenizers, as the jobs take them, and the same in fair-esm."""

import functools

import esm as fair_esm
import mlx.core as mx
import torch

from mlx_esm_hf import Esm1Tokenizer, EsmTokenizer, MLXEsmConfig, MLXEsmForMaskedLM
from mlx_esm_hf.pipelines.protein_model import ProteinModel
from tests.tiny import tiny
from tests.vocabulary import write_vocabulary

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"


def write_model(folder, family="ESM-2", positions=1026, seed=0):
    """A checkpoint of random weights, large enough that answers differ, and its tokenizer."""
    mx.random.seed(seed)
    settings = {"eos_token_id": 2, "max_position_embeddings": positions, "initializer_range": 0.3}
    config = MLXEsmConfig(**tiny(family, **settings))
    MLXEsmForMaskedLM(config).save_pretrained(folder)
    EsmTokenizer(write_vocabulary(folder)).save_pretrained(folder)
    return folder


@functools.cache
def fair_esm_pair(family):
    """fair-esm's model and alphabet, and ours with the same parameters."""
    from tests.parity import fair_esm_peers

    peers = fair_esm_peers(family)
    if family == "ESM-1":
        tokenizer = Esm1Tokenizer()
    else:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            tokenizer = EsmTokenizer(write_vocabulary(folder))
    alphabet = fair_esm.Alphabet.from_architecture("ESM-1" if family == "ESM-1" else "ESM-1b")
    return peers.torch, alphabet, ProteinModel(peers.mlx, tokenizer, family)


def fair_esm_tokens(alphabet, sequence):
    return alphabet.get_batch_converter()([("", sequence)])[2]


def fair_esm_log_probabilities(model, tokens):
    with torch.no_grad():
        return torch.log_softmax(model(tokens)["logits"].float(), dim=-1)[0].numpy()
