"""The table of key dialects, read in both directions; what real files hold is tested in test_modeling_utils."""

import pytest
from mlx.utils import tree_flatten

import mlx_esm_hf
from mlx_esm_hf import MLXEsm1Config, MLXEsmConfig
from mlx_esm_hf.checkpoint.names import canonical_names, published_names

TASKS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
SHAPE = {"hidden_size": 8, "num_hidden_layers": 11, "num_attention_heads": 2, "intermediate_size": 8}
TOKENS = {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}
CONFIGS = {
    "esm2": lambda: MLXEsmConfig(**SHAPE, **TOKENS, position_embedding_type="rotary"),
    "esm1b": lambda: MLXEsmConfig(**SHAPE, **TOKENS, emb_layer_norm_before=True),
    "untied": lambda: MLXEsmConfig(**SHAPE, **TOKENS, tie_word_embeddings=False),
    "esm1": lambda: MLXEsm1Config(**SHAPE),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_both_directions(kind, task):
    """Every parameter is published under one key or more, each of which is read back as that parameter."""
    model = getattr(mlx_esm_hf, f"MLXEsm{task}")(CONFIGS[kind]())
    parameters = dict(tree_flatten(model.parameters()))
    published = published_names(model.state_dict(), SHAPE["num_hidden_layers"])
    names = canonical_names(published, parameters, "esm")
    assert sorted(names.values()) == sorted(parameters)
    assert all(published[key] is parameters[name] for key, name in names.items())


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
    """With the prefix of a model with a head and without it, into a model with a head and without one."""
    for prefix in ("", "esm."):
        assert canonical_names([prefix + key], EXPECTED, "esm") == {prefix + key: name}
        assert canonical_names([prefix + key], WITH_HEAD, "esm") == {prefix + key: f"esm.{name}"}


@pytest.mark.parametrize("prefix", ["", "esm."])
def test_what_nothing_reads(prefix):
    ignored = [f"{prefix}embeddings.position_ids", f"{prefix}embeddings.position_embeddings.weight"]
    assert canonical_names(ignored, EXPECTED, "esm") == {}
    absolute = EXPECTED | {"embeddings.position_embeddings.weight"}
    assert canonical_names(ignored, absolute, "esm") == {ignored[1]: "embeddings.position_embeddings.weight"}


def test_unknown_keys_keep_their_names():
    keys = ["esm.encoder.layer.0.LayerNorm.delta", "gamma", "esm.encoder.layer.x.attention.self.inv_freq"]
    assert canonical_names(keys, EXPECTED, "esm") == {key: key for key in keys}


def test_the_first_layer_counts():
    keys = [f"encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq" for i in (10, 2, 0, 1)]
    assert canonical_names(keys, EXPECTED, "esm") == {keys[2]: "rotary_embeddings.inv_freq"}


def test_tied_head():
    """Its key stands for the embedding's where that is absent; where both are there, the embedding's counts."""
    head, table = "lm_head.decoder.weight", "esm.embeddings.word_embeddings.weight"
    assert canonical_names([head], WITH_HEAD, "esm") == {head: table}
    assert canonical_names([head, table], WITH_HEAD, "esm") == {table: table}
    assert canonical_names([head, table], WITH_HEAD | {head}, "esm") == {head: head, table: table}
    assert canonical_names([head], EXPECTED, "esm") == {head: head}


def test_published_head():
    """Written only where it is not the embedding itself."""
    head, table = "lm_head.decoder.weight", "esm.embeddings.word_embeddings.weight"
    weight = object()
    assert published_names({head: weight, table: weight}, 1) == {table: weight}
    assert published_names({head: 1, table: weight}, 1) == {head: 1, table: weight}
