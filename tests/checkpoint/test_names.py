"""Key dialects in both directions. Real files are tested in test_modeling_utils."""

import argparse

import esm
import pytest
from mlx.utils import tree_flatten

import mlx_esm_hf
from mlx_esm_hf import MLXEsm1Config, MLXEsmConfig
from mlx_esm_hf.checkpoint import names
from mlx_esm_hf.checkpoint.names import names_in
from mlx_esm_hf.models.esm.names import FAIR_ESM, FAIR_ESM_1, TRANSFORMERS_4, TRANSFORMERS_5
from tests.tiny import SIZE, tiny

TASKS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
LAYERS = 11  # some layers have a number of two digits
CONFIGS = {
    "esm2": lambda: MLXEsmConfig(**tiny("ESM-2", num_hidden_layers=LAYERS)),
    "esm1b": lambda: MLXEsmConfig(**tiny("ESM-1b", num_hidden_layers=LAYERS)),
    "untied": lambda: MLXEsmConfig(**tiny("ESM-1v", num_hidden_layers=LAYERS, tie_word_embeddings=False)),
    "esm1": lambda: MLXEsm1Config(**{**SIZE, "num_hidden_layers": LAYERS}),
}

DIALECTS = (TRANSFORMERS_4, TRANSFORMERS_5, FAIR_ESM, FAIR_ESM_1)
HEAD, TABLE = "lm_head.decoder.weight", "esm.embeddings.word_embeddings.weight"


def canonical_names(keys, expected, prefix):
    return names.canonical_names(keys, expected, prefix, DIALECTS, {HEAD: TABLE})


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dialect", DIALECTS, ids=["transformers 4", "transformers 5", "fair-esm", "fair-esm, ESM-1"])
def test_both_directions(dialect, kind, task):
    """Every parameter has at least one key in each dialect, and each key is read back as that parameter."""
    model = getattr(mlx_esm_hf, f"MLXEsm{task}")(CONFIGS[kind]())
    parameters = dict(tree_flatten(model.parameters()))
    named = names_in(dialect, model.state_dict(), LAYERS, "esm")
    found = canonical_names(named, parameters, "esm")
    assert sorted(found.values()) == sorted(parameters)
    assert all(named[key] is parameters[name] for key, name in found.items())


@pytest.mark.parametrize("kind", ["esm1", "esm1b", "esm2"])
def test_fair_esm(kind):
    """The models of fair-esm have exactly these keys."""
    layers = LAYERS
    if kind == "esm2":
        theirs = esm.ESM2(layers, 8, 2, "ESM-1b")
    else:
        args = argparse.Namespace(layers=layers, embed_dim=8, ffn_embed_dim=8, attention_heads=2, token_dropout=True)
        args.arch = "protein_bert_base" if kind == "esm1" else "roberta_large"
        args.final_bias, args.max_positions, args.emb_layer_norm_before = True, 1024, True
        theirs = esm.ProteinBertModel(args, esm.Alphabet.from_architecture("ESM-1" if kind == "esm1" else "ESM-1b"))
    model = mlx_esm_hf.MLXEsmForMaskedLM(CONFIGS[kind]())
    dialect = FAIR_ESM_1 if kind == "esm1" else FAIR_ESM
    named = names_in(dialect, model.state_dict(), layers, "esm")
    assert named.keys() == theirs.state_dict().keys() - set(dialect.ignored)


EXPECTED = {
    "embeddings.word_embeddings.weight",
    "encoder.layer.0.LayerNorm.weight",
    "encoder.layer.0.LayerNorm.bias",
    "encoder.layer.0.attention.LayerNorm.bias",
    "rotary_embeddings.inv_freq",
}
WITH_HEAD = {f"esm.{name}" for name in EXPECTED} | {"lm_head.bias"}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("encoder.layer.0.LayerNorm.gamma", "encoder.layer.0.LayerNorm.weight"),
        ("encoder.layer.0.LayerNorm.beta", "encoder.layer.0.LayerNorm.bias"),
        ("encoder.layer.0.attention.LayerNorm.beta", "encoder.layer.0.attention.LayerNorm.bias"),
        ("encoder.layer.7.attention.self.rotary_embeddings.inv_freq", "rotary_embeddings.inv_freq"),
        ("encoder.layer.*.attention.self.rotary_embeddings.inv_freq", "rotary_embeddings.inv_freq"),
        ("rotary_embeddings.inv_freq", "rotary_embeddings.inv_freq"),
    ],
)
def test_renames(key, name):
    """With and without prefix, for a model with a head and one without."""
    for prefix in ("", "esm."):
        assert canonical_names([prefix + key], EXPECTED, "esm") == {prefix + key: name}
        assert canonical_names([prefix + key], WITH_HEAD, "esm") == {prefix + key: f"esm.{name}"}


@pytest.mark.parametrize("prefix", ["", "esm."])
def test_ignored_keys(prefix):
    ignored = [f"{prefix}embeddings.position_ids", f"{prefix}embeddings.position_embeddings.weight"]
    assert canonical_names(ignored, EXPECTED, "esm") == {}
    absolute = EXPECTED | {"embeddings.position_embeddings.weight"}
    assert canonical_names(ignored, absolute, "esm") == {ignored[1]: "embeddings.position_embeddings.weight"}


def test_unknown_keys_keep_their_names():
    keys = ["esm.encoder.layer.0.LayerNorm.delta", "gamma", "esm.encoder.layer.x.attention.self.inv_freq"]
    assert canonical_names(keys, EXPECTED, "esm") == {key: key for key in keys}


def test_first_layer_is_used():
    keys = [f"encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq" for i in (10, 2, 0, 1)]
    assert canonical_names(keys, EXPECTED, "esm") == {keys[2]: "rotary_embeddings.inv_freq"}


def test_tied_head():
    """The key of a tied head replaces a missing one of the embedding. If both exist, that of the embedding is used."""
    head, table = HEAD, TABLE
    assert canonical_names([head], WITH_HEAD, "esm") == {head: table}
    assert canonical_names([head, table], WITH_HEAD, "esm") == {table: table}
    assert canonical_names([head, table], WITH_HEAD | {head}, "esm") == {head: head, table: table}
    assert names.canonical_names([head], EXPECTED, "esm", DIALECTS, {}) == {head: head}
