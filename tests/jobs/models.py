"""Tiny models of each family with their tokenizers, and the same models in fair-esm."""

import functools

import esm as fair_esm
import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten

from mlx_esm_hf import (
    Esm1Tokenizer,
    EsmTokenizer,
    MLXEsmConfig,
    MLXEsmFold2Config,
    MLXEsmFold2Model,
    MLXEsmForMaskedLM,
    MLXEsmForProteinFolding,
)
from mlx_esm_hf.jobs.protein_model import ProteinModel
from tests.tiny import as_loaded, tiny, tiny_folding, tiny_folding2
from tests.vocabulary import write_vocabulary

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
MASKED = UBIQUITIN[:5] + "<mask>" * 3 + UBIQUITIN[8:30]


def write_model(folder, family="ESM-2", positions=1026, seed=0):
    """Write a checkpoint of random weights, large enough that results differ, with its tokenizer."""
    mx.random.seed(seed)
    settings = {"eos_token_id": 2, "max_position_embeddings": positions, "initializer_range": 0.3}
    config = MLXEsmConfig(**tiny(family, **settings))
    as_loaded(MLXEsmForMaskedLM(config)).save_pretrained(folder)
    EsmTokenizer(write_vocabulary(folder)).save_pretrained(folder)
    return folder


@functools.cache
def fair_esm_pair(family):
    """Return fair-esm's model and alphabet, and our model with the same parameters."""
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


def write_folding_model(folder, seed=0):
    """Write a folding checkpoint of random weights.

    They are scaled so that residues are far apart; with the initial weights all would lie within a few Å.
    """
    draw = np.random.default_rng(seed)
    model = MLXEsmForProteinFolding(MLXEsmConfig(**tiny_folding()))
    weights = []
    for name, parameter in sorted(tree_flatten(model.parameters()), key=lambda pair: pair[0]):
        values = draw.standard_normal(parameter.shape)
        if mx.issubdtype(parameter.dtype, mx.integer) or name.endswith("inv_freq"):
            continue
        if "embedding" in name or "recycle_disto" in name:
            values *= 0.5
        elif parameter.ndim == 2:
            values *= parameter.shape[1] ** -0.5
        elif name.endswith("bias"):
            values *= 0.1
        elif name != "esm_s_combine":
            values = 1 + 0.2 * values
        weights.append((name, mx.array(values.astype(np.float32))))
    model.load_weights(weights, strict=False)
    model.save_pretrained(folder)
    return folder


def write_folding2_model(folder, msa=True, seed=0, **overrides):
    """Write an ESMFold2 checkpoint of random weights, scaled so that every part has an effect."""
    draw = np.random.default_rng(seed)
    model = MLXEsmFold2Model(MLXEsmFold2Config(**tiny_folding2(msa, **overrides)))
    weights = []
    for name, parameter in sorted(tree_flatten(model.parameters()), key=lambda pair: pair[0]):
        values = draw.standard_normal(parameter.shape)
        if model.is_buffer(name):
            continue
        if ".log_" in name:
            values *= 0.3
        elif "embed" in name and parameter.ndim == 2:
            values *= 0.5
        elif parameter.ndim > 1:
            values *= parameter.shape[1] ** -0.5
        elif name.endswith("bias"):
            values *= 0.2
        elif name != "language_model.layer_weights":
            values = 1 + 0.2 * values
        weights.append((name, mx.array(values.astype(np.float32))))
    model.load_weights(weights, strict=False)
    model.save_pretrained(folder)
    return folder
