"""Quantized models: quantize, save and load them, and call what scripts call."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten

from mlx_esm_hf import (
    MLXAutoModel,
    MLXAutoModelForMaskedLM,
    MLXEsm1Config,
    MLXEsmcConfig,
    MLXEsmcForMaskedLM,
    MLXEsmConfig,
    MLXEsmForMaskedLM,
    MLXEsmForProteinFolding,
    MLXEsmForTokenClassification,
    MLXEsmModel,
)
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.modeling_layers import Linear, QuantizedEmbedding, QuantizedLinear, dequantized_weight
from mlx_esm_hf.quantization.layers import (
    QuantSpec,
    block_of,
    choose_specs,
    dequantize_layers,
    has_int8_activations,
    layers,
    make_spec,
    replace_layers,
    spec_for,
    spec_of,
)
from tests.marks import needs_cpu
from tests.tiny import as_loaded, tiny_folding

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}
TOKENS = {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32, "eos_token_id": 2}
FAMILY = {"position_embedding_type": "rotary", "initializer_range": 0.1, "token_dropout": True}
IDS = [[0, 20, 15, 32, 6, 7, 11, 4, 2], [0, 20, 9, 8, 5, 2, 1, 1, 1]]
MASK = [[1] * 9, [1] * 6 + [0] * 3]
MODES = {mode: make_spec(mode=mode, group_size=32 if mode == "affine" else None) for mode in ("affine", "mxfp4")} | {
    mode: make_spec(mode=mode) for mode in ("mxfp8", "nvfp4")
}
QUERY = "esm.encoder.layer.0.attention.self.query"


def small(cls=MLXEsmForMaskedLM, **overrides):
    mx.random.seed(0)
    return as_loaded(cls(MLXEsmConfig(**TOKENS | FAMILY | SMALL | overrides))).eval()


def esm1():
    mx.random.seed(0)
    return as_loaded(MLXEsmForMaskedLM(MLXEsm1Config(**SMALL, initializer_range=0.1))).eval()


def esmc():
    mx.random.seed(0)
    return as_loaded(MLXEsmcForMaskedLM(MLXEsmcConfig(**SMALL, initializer_range=0.1))).eval()


def quantized(model, spec=MODES["affine"], rules=None):
    specs, _ = choose_specs(model, spec, rules or {})
    replace_layers(model, specs)
    return model


def logits(model):
    return np.array(model(IDS, MASK).logits.astype(mx.float32))


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# Specs


@pytest.mark.parametrize(
    ("asked", "spec"),
    [
        ({}, (64, 4, "affine")),
        ({"bits": 8, "group_size": 128}, (128, 8, "affine")),
        ({"mode": "mxfp4"}, (32, 4, "mxfp4")),
        ({"mode": "mxfp8"}, (32, 8, "mxfp8")),
        ({"mode": "nvfp4", "bits": 4}, (16, 4, "nvfp4")),
    ],
)
def test_defaults_are_those_of_mlx(asked, spec):
    assert make_spec(**asked) == QuantSpec(*spec)
    layer = nn.Linear(128, 4).to_quantized(**asked)
    assert spec_of(layer) == QuantSpec(*spec)


def test_default_group_size_with_int8_activations():
    assert make_spec(8, activation_dtype="int8") == QuantSpec(32, 8, "affine", "int8")
    assert make_spec(8, 64, activation_dtype="int8") == QuantSpec(64, 8, "affine", "int8")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"bits": 7}, "bits must be one of 2, 3, 4, 5, 6, 8 in mode 'affine', got 7"),
        ({"group_size": 16}, "group_size must be one of 32, 64, 128 in mode 'affine', got 16"),
        ({"mode": "mxfp4", "bits": 8}, "bits must be one of 4 in mode 'mxfp4', got 8"),
        ({"mode": "nvfp4", "group_size": 32}, "group_size must be one of 16 in mode 'nvfp4', got 32"),
        ({"activation_dtype": "int4"}, "activation_dtype must be one of int8, got 'int4'"),
        ({"activation_dtype": "int8", "bits": 6}, "activation_dtype 'int8' needs mode 'affine' and 4 or 8 bits"),
        ({"activation_dtype": "int8", "mode": "mxfp8"}, "activation_dtype 'int8' needs mode 'affine' and 4 or 8 bits"),
        ({"mode": "int8"}, "mode must be one of affine, mxfp4, mxfp8, nvfp4, got 'int8'"),
    ],
)
def test_unsupported_specs(asked, message):
    with pytest.raises(ValueError, match=message):
        make_spec(**asked)


@pytest.mark.parametrize(
    ("width", "asked", "fitting"),
    [(1280, 128, 128), (480, 64, 32), (480, 128, 32), (1920, 64, 64), (320, 128, 64), (64, 32, 32), (600, 64, None)],
)
def test_group_size_divides_the_width(width, asked, fitting):
    found = spec_for(width, make_spec(group_size=asked))
    assert (found and found.group_size) == fitting


def test_layers_in_full_precision():
    model = quantized(small(MLXEsmForTokenClassification))
    chosen = {path for path, layer in layers(model) if spec_of(layer)}
    others = {path for path, layer in layers(model) if not spec_of(layer)}
    assert len(chosen) == 2 * 6 and all(path.startswith("esm.encoder.layer.") for path in chosen)
    assert others == {"classifier", "esm.contact_head.regression", "esm.embeddings.word_embeddings"}
    assert all(isinstance(layer, QuantizedLinear) for path, layer in layers(model) if path in chosen)


def test_rules():
    rules = {"*.query": make_spec(8, 32), "*.layer.1.*": None, "lm_head.*": MODES["nvfp4"]}
    model = quantized(small(tie_word_embeddings=False), MODES["affine"], rules)
    found = {path: spec_of(layer) for path, layer in layers(model)}
    assert found[QUERY] == make_spec(8, 32) and found[QUERY.replace("query", "key")] == MODES["affine"]
    assert not any(spec for path, spec in found.items() if ".layer.1." in path)
    assert found["lm_head.dense"] == found["lm_head.decoder"] == MODES["nvfp4"]
    with pytest.raises(
        ValueError, match="No layer matches 'decoder'. The layers are .*, esm.encoder.layer.*.output.dense, "
    ):
        choose_specs(small(), MODES["affine"], {"decoder": None})


def test_width_no_group_size_divides():
    specs, too_narrow = choose_specs(small(hidden_size=40), MODES["affine"], {})
    assert set(too_narrow.values()) == {40} and len(too_narrow) == 10
    assert set(specs) == {f"esm.encoder.layer.{i}.output.dense" for i in (0, 1)}  # 128 wide


def test_480_wide():
    """In ESM-2 35M, 64 divides only the feed-forward width of 1,920."""
    model = quantized(small(hidden_size=480, intermediate_size=1920, num_hidden_layers=1), make_spec(bits=4))
    block = block_of(model)
    assert (block["group_size"], block["bits"]) == (32, 4)
    assert block["esm.encoder.layer.0.output.dense"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert {path for path, value in block.items() if value is False} == {
        "esm.contact_head.regression",
        "esm.embeddings.word_embeddings",
        "lm_head.dense",
    }


# Files


EVERYTHING = {"*word_embeddings": make_spec(8, 32), "lm_head.*": make_spec(8, 32)}
MODELS = {
    "esm2": small,
    "untied head": lambda: small(tie_word_embeddings=False),
    "esm1b": lambda: small(position_embedding_type="absolute", max_position_embeddings=40),
    "esm1": esm1,
    "no head": lambda: small(MLXEsmModel),
    "residues": lambda: small(MLXEsmForTokenClassification),
    "esmc": esmc,
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("made", MODELS)
def test_save_load_save(made, mode, dtype, tmp_path):
    """Saving a loaded model writes the same bytes, and both models give identical outputs."""
    model = quantized(MODELS[made]().to(dtype), MODES[mode])
    model.save_pretrained(tmp_path / "a")
    again, info = type(model).from_pretrained(tmp_path / "a", dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    again.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    a, b = (m(IDS, MASK)[0] for m in (model, again))
    assert mx.array_equal(a, b)
    assert block_of(again) == json.loads((tmp_path / "a" / "config.json").read_text())["quantization"]


@pytest.mark.parametrize("bits", [4, 8])
def test_activation_dtype_is_saved(bits, tmp_path):
    """Layers and config keep it; without it, the config does not mention it."""
    weights_only, rounding = (quantized(small(), make_spec(bits, 32, activation_dtype=a)) for a in (None, "int8"))
    rounding.save_pretrained(tmp_path)
    block = json.loads((tmp_path / "config.json").read_text())["quantization"]
    assert block == {"group_size": 32, "bits": bits, "mode": "affine", "activation_dtype": "int8"} | {
        path: False for path, layer in layers(rounding) if spec_of(layer) is None
    }
    assert "activation_dtype" not in block_of(weights_only)
    loaded = MLXEsmForMaskedLM.from_pretrained(tmp_path)
    assert np.array_equal(logits(loaded), logits(rounding))
    difference = np.abs(logits(rounding) - logits(weights_only)).max() / np.abs(logits(weights_only)).max()
    assert 1e-4 < difference < 0.1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("source", [MLXEsmForMaskedLM, MLXAutoModelForMaskedLM])
def test_activation_dtype_at_loading(source, bits, tmp_path):
    """Outputs and files equal those of a checkpoint converted with it; the loaded checkpoint is unchanged."""
    quantized(small(), make_spec(bits, 32, activation_dtype="int8")).save_pretrained(tmp_path / "rounding")
    quantized(small(), make_spec(bits, 32)).save_pretrained(tmp_path / "weights")
    expected = MLXEsmForMaskedLM.from_pretrained(tmp_path / "rounding")
    loaded = source.from_pretrained(tmp_path / "weights", activation_dtype="int8")
    assert np.array_equal(logits(loaded), logits(expected)) and block_of(loaded) == block_of(expected)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "rounding" / name).read_bytes()
    plain = MLXEsmForMaskedLM.from_pretrained(tmp_path / "weights")
    assert not has_int8_activations(plain) and not np.array_equal(logits(plain), logits(loaded))


def test_activation_dtype_skips_unsupported_layers(tmp_path):
    """3-bit layers have no int8 kernel, and embeddings have no inputs to round."""
    rules = {"*word_embeddings": make_spec(8, 32), "*.layer.0.*": make_spec(3, 32)}
    quantized(small(), make_spec(8, 32), rules).save_pretrained(tmp_path)
    loaded = MLXEsmForMaskedLM.from_pretrained(tmp_path, activation_dtype="int8")
    rounding = {path for path, layer in layers(loaded) if (spec := spec_of(layer)) and spec.activation_dtype}
    chosen = {path for path, layer in layers(loaded) if spec_of(layer)}
    assert len(chosen) == 13 and rounding == {path for path in chosen if ".layer.1." in path}


@pytest.mark.parametrize(
    ("spec", "activation_dtype", "message"),
    [
        (None, "int8", "mode 'affine', but .* is not quantized. Quantize it with mlx-esm convert"),
        (make_spec(3, 32), "int8", r"mode 'affine', but .* has layers of 3 bits \(affine\)."),
        (make_spec(mode="mxfp8"), "int8", r"mode 'affine', but .* has layers of 8 bits \(mxfp8\)."),
        (make_spec(8, 32), "int4", "activation_dtype must be one of int8, got 'int4'"),
    ],
)
def test_unsupported_activation_dtype(spec, activation_dtype, message, tmp_path):
    model = small() if spec is None else quantized(small(), spec)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MLXEsmForMaskedLM.from_pretrained(tmp_path, activation_dtype=activation_dtype)


@pytest.mark.parametrize("made", ["esm2", "untied head", "esm1"])
def test_quantized_embeddings_and_heads(made, tmp_path):
    rules = {"*word_embeddings": make_spec(8, 32), "lm_head.*": make_spec(8, 32)}
    if made == "esm2":
        assert isinstance(quantized(small(), rules=rules).get_input_embeddings(), QuantizedEmbedding)
    if made == "esm1":  # ESM-1 has no lm_head.dense, and an untied decoder
        rules["lm_head.decoder"] = rules.pop("lm_head.*")
    model = quantized(MODELS[made](), rules=rules)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again, info = MLXEsmForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    np.testing.assert_array_equal(logits(again), logits(model))
    dequantize_layers(model, mx.float32)
    assert block_of(model) is None
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-5)


@needs_cpu
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_stay_in_half_precision(dtype, tmp_path):
    """On a CPU only the scales stay in half precision by default; outputs equal those of float32 scales."""
    quantized(small().to(dtype), rules={"*word_embeddings": make_spec(8, 32)}).save_pretrained(tmp_path)
    loaded = MLXEsmForMaskedLM.from_pretrained(tmp_path)
    float32 = MLXEsmForMaskedLM.from_pretrained(tmp_path, dtype="float32")
    assert loaded.dtype == mx.float32
    for path, layer in layers(loaded):
        if spec_of(layer):
            expected = mx.float32 if path.endswith("word_embeddings") else getattr(mx, dtype)
            assert layer.scales.dtype == layer.biases.dtype == expected, path
    assert all(x.dtype != getattr(mx, dtype) for n, x in loaded.named_parameters() if n.split(".")[-1] == "weight")
    np.testing.assert_allclose(logits(loaded), logits(float32), rtol=1e-5, atol=1e-5)


def test_float16_checkpoint_loaded_as_float32(tmp_path):
    """With dtype="float32" the scales are float32 too, and their values are unchanged."""
    model = quantized(small().to("float16"))
    model.save_pretrained(tmp_path)
    again = MLXEsmForMaskedLM.from_pretrained(tmp_path, dtype="float32")
    for (path, layer), (_, loaded) in zip(layers(model), layers(again), strict=True):
        if spec_of(layer):
            assert loaded.scales.dtype == mx.float32 and mx.array_equal(loaded.scales, layer.scales), path
            assert loaded.weight.dtype == mx.uint32 and mx.array_equal(loaded.weight, layer.weight), path


def hold_quantized(model, folder):
    """Compare outputs with those of the loaded and of the dequantized model."""
    model.save_pretrained(folder)
    found = logits(model)
    np.testing.assert_array_equal(logits(type(model).from_pretrained(folder)), found)
    dequantize_layers(model, mx.float32)
    np.testing.assert_allclose(found, logits(model), atol=1e-5 * np.abs(found).max())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("group_size, bits", [(None, None), (32, 8), (32, 4), (64, 3), (128, 8)])
@pytest.mark.parametrize("made", ["esm2", "esm1", "esmc"])
def test_mlx_nn_quantize(tmp_path, made, group_size, bits):
    """It skips layers whose width groups do not divide, such as the contact head."""
    model = MODELS[made]()
    fitting = {path for path, layer in layers(model) if layer.weight.shape[1] % (group_size or 64) == 0}
    nn.quantize(model, group_size, bits)
    assert fitting and fitting == {path for path, layer in layers(model) if spec_of(layer)}
    assert not any("contact_head" in path for path in fitting)
    hold_quantized(model, tmp_path)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("made", ["esm2", "esm1", "esmc"])
def test_mlx_nn_quantize_in_other_modes(tmp_path, made, mode):
    """They are not for embedding tables."""
    with pytest.raises(ValueError, match="embedding table must be 'affine'"):
        nn.quantize(MODELS[made](), mode=mode)
    model = MODELS[made]()
    nn.quantize(model, mode=mode, class_predicate=lambda _, layer: isinstance(layer, Linear))
    assert {spec_of(layer).mode for _, layer in layers(model) if spec_of(layer)} == {mode}
    hold_quantized(model, tmp_path)


@pytest.mark.usefixtures("backend")
def test_quantized_stem_of_a_folding_model(tmp_path):
    """The trunk reads plain weights."""
    mx.random.seed(0)
    model = MLXEsmForProteinFolding(MLXEsmConfig(**tiny_folding() | SMALL | {"initializer_range": 0.1})).eval()
    with pytest.raises(ValueError, match=r"trunk\..* cannot be quantized: .* mlx.nn.quantize\(model.esm\)"):
        nn.quantize(model, 32)
    assert not any(spec_of(layer) for _, layer in layers(model))
    nn.quantize(model.esm, 32)
    found = model.infer("MKTAYIAKQR").plddt
    model.save_pretrained(tmp_path)
    loaded = MLXEsmForProteinFolding.from_pretrained(tmp_path)
    assert spec_of(loaded.esm.encoder.layer[0].output.dense)
    assert mx.array_equal(loaded.infer("MKTAYIAKQR").plddt, found)
    dequantize_layers(model, mx.float32)
    np.testing.assert_allclose(model.infer("MKTAYIAKQR").plddt, found, atol=1e-4)


def test_mlx_lm_config_block(tmp_path):
    """mlx-lm does not list full-precision layers: layers with scales in the file are quantized."""
    model = quantized(small())
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, quantization={"group_size": 32, "bits": 4}, quantization_config=None)
    np.testing.assert_array_equal(logits(MLXEsmForMaskedLM.from_pretrained(tmp_path)), logits(model))


def test_another_class(tmp_path):
    """The encoder stays quantized with any head; a new head is not quantized."""
    model = quantized(small(), rules=EVERYTHING)
    model.save_pretrained(tmp_path / "lm")
    base = MLXAutoModel.from_pretrained(tmp_path / "lm")
    states = base(IDS, MASK).last_hidden_state
    assert mx.array_equal(states, model.esm(IDS, MASK).last_hidden_state)
    residues = MLXEsmForTokenClassification.from_pretrained(tmp_path / "lm")
    assert spec_of(residues.esm.encoder.layer[0].output.dense) and not spec_of(residues.classifier)
    base.save_pretrained(tmp_path / "base")
    once_more = MLXEsmForTokenClassification.from_pretrained(tmp_path / "base")
    assert mx.array_equal(once_more.esm(IDS, MASK).last_hidden_state, states)


def test_dequantized_checkpoint_in_torch(tmp_path):
    model = quantized(small(), rules=EVERYTHING)
    expected = logits(model)
    dequantize_layers(model, mx.float32)
    model.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()
    theirs = transformers.EsmForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        outputs = theirs(torch.tensor(IDS), torch.tensor(MASK)).logits.numpy()
    real = np.array(MASK, bool)
    np.testing.assert_allclose(outputs[real], expected[real], atol=1e-5)


def test_dequantized_model_has_no_quantization_block(tmp_path):
    quantized(small()).save_pretrained(tmp_path / "quantized")
    model = MLXEsmForMaskedLM.from_pretrained(tmp_path / "quantized")
    dequantize_layers(model, mx.float32)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization" not in (tmp_path / "plain" / "config.json").read_text()
    np.testing.assert_array_equal(logits(MLXEsmForMaskedLM.from_pretrained(tmp_path / "plain")), logits(model))


def test_transformers_refuses_quantized_checkpoints(tmp_path):
    quantized(small()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization config from the arguments has no `quant_method`"):
        transformers.EsmForMaskedLM.from_pretrained(tmp_path)


# Damage


@pytest.fixture
def folder(tmp_path):
    quantized(small()).save_pretrained(tmp_path)
    return tmp_path


def edit_weights(folder, **arrays):
    path = str(folder / "model.safetensors")
    kept = {key: mx.array(array) for key, array in mx.load(path).items()} | arrays
    mx.save_safetensors(path, {k: v for k, v in kept.items() if v is not None}, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (None, "'esm.encoder.layer.0.attention.output.dense' and 11 more layers are quantized, but the config has no"),
        ({"bits": 4}, "block does not describe 'esm.encoder.*': 'group_size' is missing"),
        ({"bits": 4, "group_size": 17}, "group_size must be one of 32, 64, 128 in mode 'affine', got 17"),
        ({"bits": "4", "group_size": 32}, "'bits' must be an integer, got '4'"),
        ({"bits": 8.0, "group_size": 32}, "'bits' must be an integer, got 8.0"),
        ({"bits": True, "group_size": 32}, "'bits' must be an integer, got True"),
        ({"bits": 4, "group_size": "32"}, "'group_size' must be an integer, got '32'"),
        ({"bits": 4, "group_size": 0}, "'group_size' must be at least 1, got 0"),
        ({"bits": -4, "group_size": 32}, "bits must be one of .* got -4"),
        ({"bits": 4, "group_size": 32, "mode": "x"}, "mode must be one of"),
        ({"bits": 4, "group_size": 32, "activation_dtype": 8}, "'activation_dtype' must be a string, got 8"),
        ({"bits": 4, "group_size": 32, "groups": 8}, "'groups' is unknown"),
        ({"bits": 4, "group_size": 32, QUERY: {"bits": 4}}, f"'{QUERY}': 'group_size' is missing"),
        ({"bits": 4, "group_size": 32, "mode": [1]}, "does not describe"),
        ({"bits": 4, "group_size": 32, QUERY: False}, f"does not describe '{QUERY}'"),
        ({"bits": 4, "group_size": 128}, "invalid `quantization` in the config .*128"),
    ],
)
def test_damaged_block(block, message, folder):
    edit_config(folder, quantization=block, quantization_config=None)
    with pytest.raises(CheckpointError, match=message):
        MLXEsmForMaskedLM.from_pretrained(folder)


def test_block_of_other_bits(folder):
    edit_config(folder, quantization={"bits": 8, "group_size": 32, "mode": "affine"})
    with pytest.raises(RuntimeError, match=r"query.weight: \(64, 8\) in the checkpoint, \(64, 16\) in the model"):
        MLXEsmForMaskedLM.from_pretrained(folder)


def test_config_of_the_unquantized_model(folder):
    with pytest.raises(CheckpointError, match="the config has no `quantization` block"):
        MLXEsmForMaskedLM.from_pretrained(folder, config=small().config)


def test_quantized_for_torch(folder):
    edit_config(folder, quantization=None, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ValueError, match="is quantized for torch .bitsandbytes., which MLX cannot read"):
        MLXEsmForMaskedLM.from_pretrained(folder)


def test_missing_scales(folder):
    edit_weights(folder, **{f"{QUERY}.biases": None})
    with pytest.raises(CheckpointError, match="lacks 1 parameters .*query.biases"):
        MLXEsmForMaskedLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("weight", mx.float32, "has dtype mlx.core.float32, expected mlx.core.uint32"),
        ("weight", mx.int32, "has dtype mlx.core.int32, expected mlx.core.uint32"),
        ("scales", mx.uint32, "has integer dtype mlx.core.uint32, expected a floating-point dtype"),
        ("bias", mx.uint32, "has integer dtype"),
    ],
)
def test_wrong_dtype(name, dtype, message, folder):
    key = f"{QUERY}.{name}"
    model = MLXEsmForMaskedLM.from_pretrained(folder)
    wrong = model.state_dict()[key].astype(dtype)
    edit_weights(folder, **{key: wrong})
    with pytest.raises(CheckpointError, match=f"'{key}' {message}"):
        MLXEsmForMaskedLM.from_pretrained(folder)
    with pytest.raises(RuntimeError, match=f"'{key}' {message}"):
        model.load_state_dict({key: wrong}, strict=False)


def test_config_of_another_width_is_refused_early(tmp_path):
    quantized(small(), rules=EVERYTHING).save_pretrained(tmp_path)
    edit_config(tmp_path, hidden_size=10**12)
    with pytest.raises(RuntimeError, match=r"word_embeddings.weight: \(33, 64\) in the checkpoint"):
        MLXEsmForMaskedLM.from_pretrained(tmp_path)


# What scripts for torch call


@pytest.mark.parametrize("mode", MODES)
def test_num_parameters_of_a_quantized_model(mode):
    plain, model = small(), quantized(small(), MODES[mode], {"*word_embeddings": make_spec(8, 32)})
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    assert model.dtype == mx.float32
    assert sum(x.nbytes for _, x in model.named_parameters()) < sum(x.nbytes for _, x in plain.named_parameters()) / 2


@pytest.mark.parametrize("mode", MODES)
def test_cast(mode):
    model = quantized(small(), MODES[mode], {"*word_embeddings": make_spec(8, 32)})
    before = {name: x for name, x in model.named_parameters() if not mx.issubdtype(x.dtype, mx.floating)}
    assert model.half().dtype == mx.float16
    after = dict(model.named_parameters())
    assert all(after[name] is x for name, x in before.items())
    assert {x.dtype for name, x in after.items() if name not in before} == {mx.float16}
    outputs = model(IDS, MASK)
    assert outputs.logits.dtype == mx.float16 and np.isfinite(logits(model)).all()


def test_state_dict_round_trip():
    model = quantized(small(), rules=EVERYTHING)
    state = dict(model.state_dict())
    other = quantized(small(), rules=EVERYTHING)
    other.update({"esm": {"encoder": {"layer": [{"output": {"dense": {"scales": mx.zeros((64, 4))}}}]}}})
    assert not np.array_equal(logits(other), logits(model))
    assert other.load_state_dict(state) == ([], [])
    np.testing.assert_array_equal(logits(other), logits(model))


def test_quantized_embeddings_cannot_be_resized():
    model = quantized(small())
    model.resize_token_embeddings(40)  # embeddings are not quantized by default
    assert logits(model).shape == (2, 9, 40)
    for rules in ({"*word_embeddings": MODES["affine"]}, {"lm_head.decoder": MODES["affine"]}):
        model = quantized(small(tie_word_embeddings="lm_head.decoder" not in rules), rules=rules)
        with pytest.raises(ValueError, match="quantized embeddings cannot be resized"):
            model.resize_token_embeddings(40)


def test_quantized_weights_are_never_trained():
    """They stay frozen: an optimizer would overwrite them."""
    model = quantized(small(), rules=EVERYTHING).train()
    model.requires_grad_()
    trained = dict(tree_flatten(model.trainable_parameters()))
    assert f"{QUERY}.bias" in trained and "esm.encoder.layer.0.LayerNorm.weight" in trained
    assert not [name for name in trained if name.endswith((".scales", ".biases")) or trained[name].dtype == mx.uint32]
    model.requires_grad_(False)
    assert not tree_flatten(model.trainable_parameters())
    model.requires_grad_()
    loss, gradients = nn.value_and_grad(model, lambda ids: model(ids, labels=ids).loss)(mx.array(IDS[:1]))
    assert np.isfinite(loss.item()) and f"{QUERY}.bias" in dict(tree_flatten(gradients))


def test_quantized_contact_head():
    """The contact head of ESM-2 3B has 1,440 weights, a multiple of 32."""
    model = quantized(
        small(num_hidden_layers=4, hidden_size=128, num_attention_heads=8),
        rules={"*contact_head*": make_spec(8, 32)},
    )
    assert spec_of(model.esm.contact_head.regression)
    contacts = np.array(model.predict_contacts(IDS[:1], MASK[:1]))
    weight = dequantized_weight(model.esm.contact_head.regression)
    assert weight.shape == (1, 32)
    dequantize_layers(model, mx.float32)
    np.testing.assert_allclose(np.array(model.predict_contacts(IDS[:1], MASK[:1])), contacts, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w, s, b: (w, s.astype(mx.float16), b),
            f"{QUERY}.scales' has dtype float16, .*biases' float32; must be",
        ),
        (lambda w, s, b: (w, s, b.astype(mx.bfloat16)), f"{QUERY}.scales' has dtype float32, .*biases' bfloat16; must"),
        (lambda w, s, b: (None, s, b), f"lacks 1 parameters .*{QUERY}.weight"),
        (lambda w, s, b: (w, None, b), f"{QUERY}.*(integer dtype|Shapes differ|in the checkpoint)"),
        (lambda w, s, b: (w, s, None), f"lacks 1 parameters .*{QUERY}.biases"),
        (lambda w, s, b: (w, s[:, :1], b), f"{QUERY}.scales: .* in the checkpoint"),
        (lambda w, s, b: (w, s[0], b), f"{QUERY}.scales: .* in the checkpoint"),
        (lambda w, s, b: (w, s[0, 0], b), f"{QUERY}.scales: .* in the checkpoint"),
        (lambda w, s, b: (w, s, mx.concatenate([b, b])), f"{QUERY}.biases: .* in the checkpoint"),
        (lambda w, s, b: (w[:, :2], s, b), f"{QUERY}.weight: .* in the checkpoint"),
        (lambda w, s, b: (w, s.at[0, 0].add(mx.nan), b), f"{QUERY}.scales' is damaged: 1 of its 128 values are NaN"),
        (lambda w, s, b: (w, s, b.at[0, 0].add(mx.inf)), f"{QUERY}.biases' is damaged: 1 of its 128 values are NaN"),
    ],
)
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_damaged_scales(change, message, dtype, folder):
    arrays = mx.load(str(folder / "model.safetensors"))
    keys = [f"{QUERY}.{part}" for part in ("weight", "scales", "biases")]
    edit_weights(folder, **dict(zip(keys, change(*(arrays[key] for key in keys)), strict=True)))
    with pytest.raises((CheckpointError, RuntimeError), match=f"(?s){message}"):
        MLXEsmForMaskedLM.from_pretrained(folder, dtype=dtype)
