"""Layers: fused operations match their parts, in original and in quantized layers."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_esm_hf
from mlx_esm_hf import MLXEsmForMaskedLM
from mlx_esm_hf.modeling_layers import (
    Embedding,
    LayerNorm,
    Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    dequantized_weight,
)
from mlx_esm_hf.ops import dispatch, gpu
from tests.parity import batch, config
from tests.tiny import SIZE, tiny_folding

ACTIVATIONS = {None: lambda x: x, "gelu": nn.gelu, "relu": nn.relu}


def close(a, b, tolerance=1e-5):
    a, b = np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))
    return np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.fixture(params=["this device", "gpu backend"])
def backend(request, monkeypatch):
    if request.param == "gpu backend":
        monkeypatch.setattr(dispatch, "backend_of", lambda *arrays: gpu)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", [None, "affine", "mxfp4", "mxfp8", "nvfp4"])
def test_linear(backend, mode, bias, activation):
    mx.random.seed(0)
    layer = Linear(64, 96, bias=bias)
    x, residual = mx.random.normal((2, 5, 64)), mx.random.normal((2, 5, 96))
    weight = layer.weight
    if mode is not None:
        layer = layer.to_quantized(mode=mode)
        assert type(layer) is QuantizedLinear and dequantized_weight(layer).shape == weight.shape
        assert 0 < mx.abs(dequantized_weight(layer) - weight).max() < 0.1
        weight = dequantized_weight(layer).astype(mx.float32)
    expected = ACTIVATIONS[activation](x @ weight.T + (layer.bias if bias else 0))
    assert close(layer(x, activation=activation), expected)
    assert close(layer(x, activation, residual), expected + residual)


def test_unknown_activation(backend):
    with pytest.raises(ValueError, match="'swish'"):
        mx.eval(Linear(4, 4)(mx.ones((1, 4)), activation="swish"))


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(backend, bias):
    layer = LayerNorm(24, eps=1e-5, bias=bias)
    layer.weight = mx.random.normal((24,))
    x = 3 + mx.random.normal((7, 24))
    normal = (x - x.mean(-1, keepdims=True)) * mx.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    assert close(layer(x), normal * layer.weight + (layer.bias if bias else 0))


def test_quantize_uses_our_layers():
    """`mlx.nn.quantize` creates our quantized layers, which support fused operations."""
    mx.random.seed(0)
    model = MLXEsmForMaskedLM(config("ESM-2", hidden_size=64, intermediate_size=128, num_attention_heads=4)).eval()
    inputs = batch("right", head="lm")
    nn.quantize(model, 32, 8)
    assert type(model.esm.contact_head.regression) is Linear  # 12 wide: groups of 32 do not divide it
    layers = [m for name, m in model.named_modules() if name.endswith(("dense", "query", "key", "value"))]
    assert layers and all(type(layer) is QuantizedLinear for layer in layers)
    reference = MLXEsmForMaskedLM(model.config).eval()
    for name, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            weight = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
            bias = {"bias": module.bias} if "bias" in module else {}
            dict(reference.named_modules())[name].update({"weight": weight, **bias})
        elif isinstance(module, nn.LayerNorm):
            dict(reference.named_modules())[name].update(module.parameters())
    reference.lm_head.bias = model.lm_head.bias
    assert close(model(**inputs).logits, reference(**inputs).logits, 1e-4)


@pytest.mark.parametrize("part", ["intermediate", "output"])
def test_layer_without_fused_operations_is_an_error(part):
    """MLX's own layer in a network raises an error instead of being silently slow."""
    model = MLXEsmForMaskedLM(config("ESM-2")).eval()
    dense = getattr(model.esm.encoder.layer[0], part).dense
    getattr(model.esm.encoder.layer[0], part).dense = nn.Linear(*dense.weight.shape[::-1])
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        model(**batch("right", head="lm"))


@pytest.mark.parametrize("layer", [Linear(64, 64), Embedding(33, 64)])
def test_quantized_activations_are_refused(layer):
    with pytest.raises(ValueError, match="quantize_input=True is not supported"):
        layer.to_quantized(quantize_input=True)


def test_quantized_embedding(backend):
    mx.random.seed(0)
    table = Embedding(33, 64)
    quantized = table.to_quantized(32, 8)
    reference = mx.dequantize(*mx.quantize(table.weight, 32, 8), 32, 8)
    assert type(quantized) is QuantizedEmbedding and mx.array_equal(dequantized_weight(quantized), reference)
    assert mx.array_equal(quantized(mx.array([[3, 4]])), reference[mx.array([[3, 4]])])
    x = mx.random.normal((2, 5, 64))
    assert close(quantized.as_linear(x), x @ reference.T)
    with pytest.raises(ValueError, match="must be 'affine', got 'mxfp4'"):
        table.to_quantized(mode="mxfp4")


def test_repr_collapses_equal_layers():
    """As in torch. A layer that differs, such as a quantized one, has an entry of its own."""
    model = MLXEsmForMaskedLM(config("ESM-2", num_hidden_layers=6))
    assert "(0-5): 6 x MLXEsmLayer(" in repr(model) and repr(model).count("MLXEsmLayer(") == 1
    assert "(0-5): 6 x MLXEsmLayer(" in repr(model.esm.encoder)
    layer = model.esm.encoder.layer[2].intermediate
    layer.dense = layer.dense.to_quantized(32, 8)
    for entry in ("(0-1): 2 x", "(2): MLXEsmLayer(", "(3-5): 3 x"):
        assert entry in repr(model)


@pytest.mark.parametrize("name", ["MLXEsmModel", "MLXEsmForSequenceClassification", "MLXEsmForTokenClassification"])
def test_repr_of_every_head(name):
    assert "(0-2): 3 x MLXEsmLayer(" in repr(getattr(mlx_esm_hf, name)(config("ESM-2", num_hidden_layers=3)))


def test_repr_of_a_folding_model_and_esmc():
    folding = mlx_esm_hf.MLXEsmForProteinFolding(mlx_esm_hf.MLXEsmConfig(**tiny_folding()))
    assert "(0-1): 2 x" in repr(folding)
    assert "(0-2): 3 x MLXEsmcLayer(" in repr(mlx_esm_hf.MLXEsmcModel(mlx_esm_hf.MLXEsmcConfig(**SIZE)))
