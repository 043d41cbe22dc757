"""Linear layers whose weights have fewer bits than float32: the kernels, each instruction set of this machine."""

from __future__ import annotations

import functools

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

SHAPES = [(1, 1), (17, 33), (70, 200), (300, 97)]  # tokens and outputs, which fill no tile
F = torch.nn.functional


pytestmark = pytest.mark.usefixtures("on_cpu")
every_set = pytest.mark.usefixtures("instructions")


def numbers(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def hold(ours: mx.array, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, residual: np.ndarray) -> None:
    """To torch's linear layer with GELU, a scale and a residual, of a weight in float64."""

    def theirs(dtype: torch.dtype) -> torch.Tensor:
        tensors = (torch.tensor(array, dtype=dtype) for array in (x, weight, bias, residual))
        x_, weight_, bias_, residual_ = tensors
        return F.gelu(F.linear(x_, weight_, bias_)) * 0.7 + residual_

    hold_to_bar(ours, theirs(torch.float32), theirs(torch.float64))


def dequantized(weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int) -> np.ndarray:
    """In float64, from the integers that MLX unpacks."""
    ones, zeros = mx.ones(scales.shape), mx.zeros(scales.shape)
    integers = np.array(mx.dequantize(weight, ones, zeros, group_size, bits)).astype(np.float64)
    scale, bias = (np.array(x.astype(mx.float32)).astype(np.float64).repeat(group_size, 1) for x in (scales, biases))
    return integers * scale + bias


def rounded(x: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The integers [tokens, groups, group_size] and the scales [tokens, groups, 1] of x, in NumPy's float32."""
    groups = x.reshape(len(x), -1, group_size)
    largest = np.abs(groups).max(-1, keepdims=True)
    return np.rint(groups * (np.float32(127) / largest)).astype(np.int64), largest / np.float32(127)


@every_set
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", dispatch.KERNEL_BITS)
def test_quantized(bits, group_size, dtype):
    """Scales and biases may be of half precision."""
    for (tokens, outputs), groups in zip(SHAPES, (1, 3, 5, 11), strict=True):
        inputs = groups * group_size
        x, bias, residual = numbers(tokens, inputs), numbers(outputs, seed=2), numbers(tokens, outputs, seed=3)
        packed = mx.quantize(
            mx.array(numbers(outputs, inputs, scale=inputs**-0.5, seed=1)).astype(dtype), group_size, bits
        )
        settings = {"group_size": group_size, "bits": bits}
        ours = native.quantized_linear(
            mx.array(x), *packed, mx.array(bias), mx.array(residual), "gelu", 0.7, **settings
        )
        hold(ours, x, dequantized(*packed, **settings), bias, residual)


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
def test_each_number_of_half_precision(dtype):
    """Denormal ones, infinities and NaN as well."""
    weight = mx.array(np.arange(2**16, dtype=np.uint16)).view(dtype).reshape(-1, 1)
    found = np.array(native.half_linear(mx.ones((1, 1)), weight))[0]
    np.testing.assert_array_equal(found, np.array(weight.astype(mx.float32))[:, 0])


@every_set
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_integers(bits, group_size):
    """They are NumPy's, to the bit: a row of one group is one of them times the scales, of which one is 1."""
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
        x[:, 0] *= 100  # which costs the other groups nothing
        packed = mx.quantize(mx.array(numbers(outputs, inputs, scale=inputs**-0.5, seed=1)), group_size, bits)
        settings = {"group_size": group_size, "bits": bits}
        more = mx.array(bias), mx.array(residual), "gelu", 0.7
        ours = native.quantized_linear(mx.array(x), *packed, *more, **settings, integers=True)
        integers, scales = rounded(x, group_size)
        near = (integers * scales.astype(np.float64)).reshape(x.shape)
        hold(ours, near, dequantized(*packed, **settings), bias, residual)


@every_set
def test_integers_of_what_is_no_number():
    x, packed = numbers(5, 64), mx.quantize(mx.array(numbers(3, 64, seed=1)), 32, 8)
    x[1, 3], x[2, 40], x[3] = np.nan, np.inf, 0
    y = np.array(native.quantized_linear(mx.array(x), *packed, group_size=32, bits=8, integers=True))
    assert np.isnan(y[[1, 2]]).all() and np.isfinite(y[[0, 3, 4]]).all() and (y[3] == 0).all()


@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
@pytest.mark.parametrize("kind", ["quantized", "integers", "half"])
def test_gradients(kind, activation):
    """By x, bias and residual those of the layer with whole weights."""
    x, bias, residual, weight = (numbers(*s, seed=i) for i, s in enumerate([(2, 9, 64), (33,), (2, 9, 33), (33, 64)]))
    if kind == "half":
        stored = mx.array(weight).astype(mx.bfloat16)
        whole = stored.astype(mx.float32)
    else:
        packed = mx.quantize(mx.array(weight), 64, 8)
        whole = mx.dequantize(*packed, 64, 8)

    def ours(x, bias, residual):
        if kind == "half":
            return native.half_linear(x, stored, bias, residual, activation, 0.7).sum()
        settings = {"group_size": 64, "bits": 8, "integers": kind == "integers"}
        return native.quantized_linear(x, *packed, bias, residual, activation, 0.7, **settings).sum()

    def plain(x, bias, residual):
        return native.linear(x, whole, bias, residual, activation, 0.7).sum()

    arguments = [mx.array(a) for a in (x, bias, residual)]
    for found, expected in zip(*(mx.grad(f, [0, 1, 2])(*arguments) for f in (ours, plain)), strict=True):
        assert mx.abs(found - expected).max() <= 1e-5 * mx.abs(expected).max()


def test_misfits():
    x, packed = mx.ones((2, 64)), mx.quantize(mx.ones((3, 64)), 32, 4)
    for arguments, settings, message in (
        ((mx.ones((2, 128)), *packed), {"group_size": 32, "bits": 4}, "x and weight do not fit"),
        ((x, *packed), {"group_size": 64, "bits": 4}, "scales and biases do not fit"),
        ((x, *packed), {"group_size": 32, "bits": 5}, "no kernel for so many bits"),
        ((x, *packed), {"group_size": 32, "bits": 2, "integers": True}, "no kernel for so many bits"),
    ):
        with pytest.raises(ValueError, match=message):
            native.quantized_linear(*arguments, **settings)


# As the backend of `ops`


@pytest.mark.parametrize(
    ("bits", "activation_dtype"), [*((bits, None) for bits in dispatch.KERNEL_BITS), (4, "int8"), (8, "int8")]
)
def test_kernels_off_give_the_same(monkeypatch, bits, activation_dtype):
    x, packed = mx.array(numbers(2, 9, 192)), mx.quantize(mx.array(numbers(33, 192, seed=1)), 64, bits)
    bias, residual = mx.array(numbers(33, seed=2)), mx.array(numbers(2, 9, 33, seed=3))
    results = []
    for module in (native, None):
        monkeypatch.setattr(kernels, "native", module)
        y = ops.quantized_linear(
            x, *packed, bias, residual, "gelu", group_size=64, bits=bits, activation_dtype=activation_dtype
        )
        results.append(np.array(y))
    assert np.abs(results[0] - results[1]).max() <= 1e-5 * np.abs(results[1]).max()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_through_float32(dtype):
    """A layer in half precision is rounded once, at its end."""
    x, weight = (mx.array(numbers(*s, seed=i)).astype(dtype) for i, s in enumerate([(9, 64), (33, 64)]))
    expected = (x.astype(mx.float32) @ weight.astype(mx.float32).T).astype(dtype)
    packed = mx.quantize(weight, 64, 4)
    whole = mx.dequantize(*(a if a.dtype == mx.uint32 else a.astype(mx.float32) for a in packed), 64, 4)
    of_packed = (x.astype(mx.float32) @ whole.T).astype(dtype)
    step = 2**-10 if dtype == mx.float16 else 2**-7
    for found, exact in (
        (ops.linear(x, weight), expected),
        (ops.quantized_linear(x, *packed, group_size=64, bits=4), of_packed),
    ):
        assert found.dtype == dtype and mx.abs(found - exact).max() <= step * mx.abs(exact).max()


@pytest.mark.parametrize("kind", ["half", "quantized", "integers"])
def test_a_token_is_the_same_whoever_comes_with_it(kind):
    x, weight = mx.array(numbers(300, 1280)), mx.array(numbers(24, 1280, seed=1))
    if kind == "half":
        layer = functools.partial(ops.linear, weight=weight.astype(mx.bfloat16))
    else:
        packed = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, 32, 8), strict=True))
        activation_dtype = "int8" if kind == "integers" else None
        layer = functools.partial(
            ops.quantized_linear, **packed, group_size=32, bits=8, activation_dtype=activation_dtype
        )
    whole = layer(x)
    for tokens in (1, 16, 17, 40, 66, 97, 257):
        assert mx.array_equal(layer(x[:tokens]), whole[:tokens]), tokens
