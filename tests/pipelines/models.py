"""Tiny models of each family with their tokenizers, as the jobs take them, and the same in fair-esm."""

import functools

import esm as fair_esm
import mlx.core as mx
import torch

from mlx_esm_hf import Esm1Tokenizer, EsmTokenizer, MLXEsmConfig, MLXEsmForMaskedLM
from mlx_esm_hf.pipelines.protein_model import ProteinModel
from tests.vocabulary import write_vocabulary

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES = {
    "ESM-2": {"position_embedding_type": "rotary", "emb_layer_norm_before": False},
    "ESM-1b": {"position_embedding_type": "absolute", "emb_layer_norm_before": True},
    "ESM-1v": {"position_embedding_type": "absolute", "emb_layer_norm_before": False},
}


def write_model(folder, family="ESM-2", positions=1026, seed=0):
    """A checkpoint of random weights, large enough that answers differ, and its tokenizer."""
    mx.random.seed(seed)
    config = MLXEsmConfig(
        vocab_size=33,
        pad_token_id=1,
        mask_token_id=32,
        eos_token_id=2,
        token_dropout=True,
        max_position_embeddings=positions,
        initializer_range=0.3,
        **SMALL,
        **FAMILIES[family],
    )
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
