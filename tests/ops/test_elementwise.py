"""The kernels of GELU, SwiGLU, softmax and layer norm, with each instruction set of this machine."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_esm_hf import ops
from mlx_esm_hf.ops import cpu
from tests.marks import needs_kernels
from tests.ops.reference import (
    EPS,
    F,
    check,
    check_gradients,
    native,
    numbers,
    plain,
    torch_layer_norm,
    torch_softmax,
    torch_swiglu,
)

pytestmark = [needs_kernels, pytest.mark.usefixtures("on_cpu")]
every_set = pytest.mark.usefixtures("instructions")
wrappings = pytest.mark.parametrize("wrap", [plain, mx.compile, mx.checkpoint], ids=["plain", "compile", "checkpoint"])


@every_set
@pytest.mark.parametrize("shape", [(5, 1), (5, 3), (2, 7, 15), (5, 33), (100, 1280)])
@pytest.mark.parametrize("scale", [0.1, 3, 1e4])
def test_elementwise(shape, scale):
    x, weight, bias = numbers(*shape, scale=scale), numbers(shape[-1], seed=1), numbers(shape[-1], seed=2)
    check(native.gelu, F.gelu, x)
    check(native.swiglu, torch_swiglu, x, numbers(*shape, seed=3))
    check(native.softmax, torch_softmax, x)
    check(native.layer_norm, torch_layer_norm, x, weight, bias, EPS)
    check(native.layer_norm, torch_layer_norm, x, weight, None, EPS)
    check(native.layer_norm, torch_layer_norm, x + np.float32(10 * scale), weight, bias, EPS)


@every_set
def test_gelu_of_extreme_values():
    x = np.array([0, 1e-30, -1e-30, 13, -13, 1e4, -1e4, 3e38, -3e38, np.inf, np.nan, 1] * 3, np.float32)[:-1]
    gelu, slope = native.gelu(mx.array(x)), mx.grad(lambda x: native.gelu(x).sum())(mx.array(x))
    exact_x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    exact = F.gelu(exact_x)
    exact.sum().backward()
    np.testing.assert_allclose(np.array(gelu), exact.detach().numpy(), rtol=1e-6, atol=1e-30)
    finite = np.isfinite(x)  # torch has no slope elsewhere
    np.testing.assert_allclose(np.array(slope)[finite], exact_x.grad.numpy()[finite], rtol=1e-6, atol=1e-6)
    assert np.isnan(np.array(slope)[np.isnan(x)]).all()


@every_set
def test_swiglu_of_extreme_values():
    x = np.array([0, 1e-30, -1e-30, 88, -88, 100, -100, 3e38, -3e38, np.inf, -np.inf, np.nan, 1] * 3, np.float32)[:-1]
    ones = mx.ones(len(x))
    y, slope = native.swiglu(mx.array(x), ones), mx.grad(lambda x: native.swiglu(x, ones).sum())(mx.array(x))
    clipped = np.where(np.isinf(x), x, x.clip(-1e3))  # below that, torch computes finite · 0
    exact_x = torch.tensor(clipped, dtype=torch.float64, requires_grad=True)
    exact = F.silu(exact_x)
    exact.sum().backward()
    np.testing.assert_allclose(np.array(y), exact.detach().numpy(), rtol=1e-6, atol=1e-30)
    finite = np.isfinite(x)
    np.testing.assert_allclose(np.array(slope)[finite], exact_x.grad.numpy()[finite], rtol=1e-6, atol=1e-6)
    assert np.isnan(np.array(slope)[np.isnan(x)]).all()


@every_set
def test_rows_with_nan_or_infinity():
    x = numbers(6, 37)
    x[1, 36], x[2, 0], x[3, 5], x[4, 5] = np.nan, np.nan, -np.inf, np.inf
    for ours, theirs in (
        (native.softmax(mx.array(x)), torch.tensor(x).softmax(-1)),
        (native.layer_norm(mx.array(x), mx.ones(37), mx.zeros(37), EPS), F.layer_norm(torch.tensor(x), (37,))),
    ):
        np.testing.assert_allclose(np.array(ours), theirs.numpy(), rtol=1e-4, atol=1e-6)


# Quiet and signalling NaN, with and without a payload and a sign.
NANS = (0x7FC00000, 0xFFC00000, 0x7FC00001, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF)


@every_set
@pytest.mark.parametrize("backend", [native, cpu], ids=["kernels", "cpu"])
@pytest.mark.parametrize("bits", [*NANS, 0x7F800000, 0xFF800000], ids=hex)
def test_nan_and_infinity_are_not_swallowed(bits, backend):
    """An element that torch does not compute as finite is not finite here."""
    x = np.linspace(-3, 3, 37).astype(np.float32)
    x.view(np.uint32)[[5, 36]] = bits  # in a whole vector, and in the last one
    ours, theirs, ones = mx.array(x), torch.tensor(x), mx.ones(37)
    for name, found, expected in (
        ("gelu", backend.gelu(ours), F.gelu(theirs)),
        ("swiglu", backend.swiglu(ours, ones), F.silu(theirs)),
        ("softmax", backend.softmax(ours), theirs.softmax(-1)),
        ("layer norm", backend.layer_norm(ours, ones, None, EPS), F.layer_norm(theirs, (37,))),
    ):
        assert np.array_equal(np.isfinite(np.array(found)), np.isfinite(expected.numpy())), name


@every_set
def test_layer_norm_reuses_the_memory_of_its_input():
    """Unless the input is held elsewhere or is part of a larger array."""
    x, weight = numbers(2000, 640), mx.ones(640)
    held = mx.array(x)
    expected = np.array(ops.layer_norm(held, weight, None, EPS))
    assert np.array_equal(np.array(held), x)
    before = mx.get_active_memory()
    y = ops.layer_norm(mx.array(x) + 0, weight, None, EPS)
    mx.eval(y)
    assert np.array_equal(np.array(y), expected)
    mx.reset_peak_memory()
    mx.eval(y := ops.layer_norm(y * 1, weight, None, EPS))
    assert mx.get_peak_memory() - before < 2.5 * y.nbytes
    rows = ops.layer_norm((mx.array(x) + 0)[:2], weight, None, EPS)
    mx.eval(rows)
    assert np.array_equal(np.array(rows), expected[:2])
    del y
    assert mx.get_active_memory() - before < x.nbytes / 2


@every_set
@wrappings
@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 15), (150, 33), (65, 320)])
def test_gradients_of_elementwise(shape, wrap):
    x, weight, bias = numbers(*shape, scale=2), numbers(shape[-1], seed=1), numbers(shape[-1], seed=2)
    check_gradients(native.gelu, F.gelu, x, wrap=wrap)
    check_gradients(native.swiglu, torch_swiglu, x, numbers(*shape, seed=3), wrap=wrap)
    check_gradients(native.softmax, torch_softmax, x, wrap=wrap)
    check_gradients(lambda *x: native.layer_norm(*x, EPS), torch_layer_norm, x + np.float32(3), weight, bias, wrap=wrap)
    check_gradients(lambda *x: native.layer_norm(*x, None, EPS), torch_layer_norm, x, weight, wrap=wrap)
