"""The kernels of linear layers with weights of fewer bits than float32, with each instruction set of this machine."""

from __future__ import annotations

import functools
import itertools

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_esm_hf import ops
from mlx_esm_hf.ops import dispatch, kernels
from tests.bar import hold_to_bar

native = kernels.native
if native is None:
    pytest.skip(f"the kernels are {kernels.STATE}", allow_module_level=True)

SHAPES = [(1, 1), (17, 33), (70, 200), (300, 97)]  # tokens and outputs that fill no tile
F = torch.nn.functional


pytestmark = pytest.mark.usefixtures("on_cpu")
every_set = pytest.mark.usefixtures("instructions")


def numbers(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def hold(ours: mx.array, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, residual: np.ndarray) -> None:
    """Compare with torch's linear layer with GELU, a scale and a residual."""

    def theirs(dtype: torch.dtype) -> torch.Tensor:
        tensors = (torch.tensor(array, dtype=dtype) for array in (x, weight, bias, residual))
        x_, weight_, bias_, residual_ = tensors
        return F.gelu(F.linear(x_, weight_, bias_)) * 0.7 + residual_

    hold_to_bar(ours, theirs(torch.float32), theirs(torch.float64))


def dequantized(weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int) -> np.ndarray:
    """Return the weight in float64, from the integers that MLX unpacks."""
    ones, zeros = mx.ones(scales.shape), mx.zeros(scales.shape)
    integers = np.array(mx.dequantize(weight, ones, zeros, group_size, bits)).astype(np.float64)
    scale, bias = (np.array(x.astype(mx.float32)).astype(np.float64).repeat(group_size, 1) for x in (scales, biases))
    return integers * scale + bias


def rounded(x: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the integers [tokens, groups, group_size] and the scales [tokens, groups, 1] of x."""
    groups = x.reshape(len(x), -1, group_size)
    largest = np.abs(groups).max(-1, keepdims=True)
    return np.rint(groups * (np.float32(127) / largest)).astype(np.int64), largest / np.float32(127)


@every_set
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", dispatch.KERNEL_BITS)
def test_quantized(bits, group_size, dtype):
    """Scales and biases may have half precision."""
    for (tokens, outputs), groups in zip(SHAPES, (1, 3, 5, 11), strict=True):
        inputs = groups * group_size
        x, bias, residual = numbers(tokens, inputs), numbers(outputs, seed=2), numbers(tokens, outputs, seed=3)
        quantized = mx.quantize(
            mx.array(numbers(outputs, inputs, scale=inputs**-0.5, seed=1)).astype(dtype), group_size, bits
        )
        settings = {"group_size": group_size, "bits": bits}
        ours = native.quantized_linear(
            mx.array(x), *quantized, mx.array(bias), mx.array(residual), "gelu", 0.7, **settings
        )
        hold(ours, x, dequantized(*quantized, **settings), bias, residual)


@every_set
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half(dtype):
    for (tokens, outputs), inputs in zip(SHAPES, (1, 7, 320, 1283), strict=True):
        x, bias, residual = numbers(tokens, inputs), numbers(outputs, seed=2), numbers(tokens, outputs, seed=3)
        weight = mx.array(numbers(outputs, inputs, scale=inputs**-0.5, seed=1)).astype(dtype)
        ours = native.half_linear(mx.array(x), weight, mx.array(bias), mx.array(residual), "gelu", 0.7)
        hold(ours, x, np.array(weight.astype(mx.float32)), bias, residual)


@every_set
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_every_number_in_half_precision(dtype):
    """This includes subnormal numbers, infinities and NaN."""
    weight = mx.array(np.arange(2**16, dtype=np.uint16)).view(dtype).reshape(-1, 1)
    found = np.array(native.half_linear(mx.ones((1, 1)), weight))[0]
    np.testing.assert_array_equal(found, np.array(weight.astype(mx.float32))[:, 0])


@every_set
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_integers(bits, group_size):
    """They are bitwise those of NumPy. With one group per row and weight scales of 1, the output is integer · scale."""
    for tokens, outputs in SHAPES:
        x = numbers(tokens, group_size)
        integers = np.random.default_rng(1).integers(0, 2**bits, (outputs, group_size), dtype=np.uint32)
        places = np.arange(32 // bits, dtype=np.uint32) * bits
        weight = (integers.reshape(outputs, -1, 32 // bits) << places).sum(-1, dtype=np.uint32)
        ones, zeros = mx.ones((outputs, 1)), mx.zeros((outputs, 1))
        settings = {"group_size": group_size, "bits": bits, "integers": True}
        y = np.array(native.quantized_linear(mx.array(x), mx.array(weight), ones, zeros, **settings))
        of_x, scales = rounded(x, group_size)
        products = of_x[:, 0] @ integers.T.astype(np.int64)
        np.testing.assert_array_equal(y, products.astype(np.float32) * scales[:, 0])


@every_set
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers(bits, group_size):
    for (tokens, outputs), groups in zip(SHAPES, (1, 3, 5, 29), strict=True):
        inputs = groups * group_size
        x, bias, residual = numbers(tokens, inputs), numbers(outputs, seed=2), numbers(tokens, outputs, seed=3)
        x[:, 0] *= 100  # other groups do not lose precision
        quantized = mx.quantize(mx.array(numbers(outputs, inputs, scale=inputs**-0.5, seed=1)), group_size, bits)
        settings = {"group_size": group_size, "bits": bits}
        more = mx.array(bias), mx.array(residual), "gelu", 0.7
        ours = native.quantized_linear(mx.array(x), *quantized, *more, **settings, integers=True)
        integers, scales = rounded(x, group_size)
        near = (integers * scales.astype(np.float64)).reshape(x.shape)
        hold(ours, near, dequantized(*quantized, **settings), bias, residual)


@every_set
def test_integers_with_nan_and_infinity():
    x, quantized = numbers(5, 64), mx.quantize(mx.array(numbers(3, 64, seed=1)), 32, 8)
    x[1, 3], x[2, 40], x[3] = np.nan, np.inf, 0
    y = np.array(native.quantized_linear(mx.array(x), *quantized, group_size=32, bits=8, integers=True))
    assert np.isnan(y[[1, 2]]).all() and np.isfinite(y[[0, 3, 4]]).all() and (y[3] == 0).all()


@every_set
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
def test_scales_with_nan_and_infinity(bits, dtype, activation):
    """A scale or a bias that is NaN or infinite spoils its output, and no other, with and without int8 inputs."""
    x = mx.array(1 + np.abs(numbers(5, 64)))
    weight, scales, biases = mx.quantize(mx.array(np.abs(numbers(3, 64, seed=1))), 32, bits)
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    for spoilt, value in itertools.product(range(2), (np.nan, np.inf)):
        parameters = [mx.array(scales), mx.array(biases)]
        parameters[spoilt][1, 0] = value
        for integers in (False, True) if bits in (4, 8) else (False,):
            options = {"activation": activation, "group_size": 32, "bits": bits, "integers": integers}
            y = np.array(native.quantized_linear(x, weight, *parameters, **options))
            assert np.isfinite(y[:, [0, 2]]).all() and not np.isfinite(y[:, 1]).any()


@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
@pytest.mark.parametrize("kind", ["quantized", "integers", "half"])
def test_gradients(kind, activation):
    """Gradients of x, bias and residual equal those of the layer with dequantized weights."""
    x, bias, residual, weight = (numbers(*s, seed=i) for i, s in enumerate([(2, 9, 64), (33,), (2, 9, 33), (33, 64)]))
    if kind == "half":
        stored = mx.array(weight).astype(mx.bfloat16)
        dequantized_weight = stored.astype(mx.float32)
    else:
        quantized = mx.quantize(mx.array(weight), 64, 8)
        dequantized_weight = mx.dequantize(*quantized, 64, 8)

    def ours(x, bias, residual):
        if kind == "half":
            return native.half_linear(x, stored, bias, residual, activation, 0.7).sum()
        settings = {"group_size": 64, "bits": 8, "integers": kind == "integers"}
        return native.quantized_linear(x, *quantized, bias, residual, activation, 0.7, **settings).sum()

    def plain(x, bias, residual):
        return native.linear(x, dequantized_weight, bias, residual, activation, 0.7).sum()

    arguments = [mx.array(a) for a in (x, bias, residual)]
    for found, expected in zip(*(mx.grad(f, [0, 1, 2])(*arguments) for f in (ours, plain)), strict=True):
        assert mx.abs(found - expected).max() <= 1e-5 * mx.abs(expected).max()


def test_wrong_shapes_are_rejected():
    x, quantized = mx.ones((2, 64)), mx.quantize(mx.ones((3, 64)), 32, 4)
    for arguments, settings, message in (
        ((mx.ones((2, 128)), *quantized), {"group_size": 32, "bits": 4}, "x and weight do not fit"),
        ((x, *quantized), {"group_size": 64, "bits": 4}, "scales and biases do not fit"),
        ((x, *quantized), {"group_size": 32, "bits": 5}, "no kernel for so many bits"),
        ((x, *quantized), {"group_size": 32, "bits": 2, "integers": True}, "no kernel for so many bits"),
    ):
        with pytest.raises(ValueError, match=message):
            native.quantized_linear(*arguments, **settings)


# As the backend of `ops`


@pytest.mark.parametrize(
    ("bits", "activation_dtype"), [*((bits, None) for bits in dispatch.KERNEL_BITS), (4, "int8"), (8, "int8")]
)
def test_same_result_without_kernels(monkeypatch, bits, activation_dtype):
    x, quantized = mx.array(numbers(2, 9, 192)), mx.quantize(mx.array(numbers(33, 192, seed=1)), 64, bits)
    bias, residual = mx.array(numbers(33, seed=2)), mx.array(numbers(2, 9, 33, seed=3))
    results = []
    for module in (native, None):
        monkeypatch.setattr(kernels, "native", module)
        y = ops.quantized_linear(
            x, *quantized, bias, residual, "gelu", group_size=64, bits=bits, activation_dtype=activation_dtype
        )
        results.append(np.array(y))
    assert np.abs(results[0] - results[1]).max() <= 1e-5 * np.abs(results[1]).max()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_through_float32(dtype):
    """A layer in half precision rounds once, at the end."""
    x, weight = (mx.array(numbers(*s, seed=i)).astype(dtype) for i, s in enumerate([(9, 64), (33, 64)]))
    expected = (x.astype(mx.float32) @ weight.astype(mx.float32).T).astype(dtype)
    quantized = mx.quantize(weight, 64, 4)
    dequantized_weight = mx.dequantize(*(a if a.dtype == mx.uint32 else a.astype(mx.float32) for a in quantized), 64, 4)
    of_quantized = (x.astype(mx.float32) @ dequantized_weight.T).astype(dtype)
    step = 2**-10 if dtype == mx.float16 else 2**-7
    for found, exact in (
        (ops.linear(x, weight), expected),
        (ops.quantized_linear(x, *quantized, group_size=64, bits=4), of_quantized),
    ):
        assert found.dtype == dtype and mx.abs(found - exact).max() <= step * mx.abs(exact).max()


@pytest.mark.parametrize("kind", ["half", "quantized", "integers"])
def test_results_do_not_depend_on_the_batch(kind):
    x, weight = mx.array(numbers(300, 1280)), mx.array(numbers(24, 1280, seed=1))
    if kind == "half":
        layer = functools.partial(ops.linear, weight=weight.astype(mx.bfloat16))
    else:
        quantized = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, 32, 8), strict=True))
        activation_dtype = "int8" if kind == "integers" else None
        layer = functools.partial(
            ops.quantized_linear, **quantized, group_size=32, bits=8, activation_dtype=activation_dtype
        )
    together = layer(x)
    for tokens in (1, 16, 17, 40, 66, 97, 257):
        assert mx.array_equal(layer(x[:tokens]), together[:tokens]), tokens
