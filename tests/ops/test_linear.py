"""The kernel of linear layers, with each instruction set of this machine."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest

from tests.marks import needs_kernels
from tests.ops.reference import (
    ACTIVATIONS,
    check,
    check_gradients,
    native,
    numbers,
    plain,
    torch_linear,
)

pytestmark = [needs_kernels, pytest.mark.usefixtures("on_cpu")]
every_set = pytest.mark.usefixtures("instructions")
wrappings = pytest.mark.parametrize("wrap", [plain, mx.compile, mx.checkpoint], ids=["plain", "compile", "checkpoint"])


@every_set
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 300, 1022])
def test_linear(tokens):
    for outputs, inputs in itertools.product([1, 5, 33, 320, 641], [1, 7, 320, 1283]):
        x, weight = numbers(tokens, inputs), numbers(outputs, inputs, scale=inputs**-0.5, seed=1)
        check(native.linear, torch_linear, x, weight)
        check(
            native.linear, torch_linear, x, weight, numbers(outputs, seed=2), numbers(tokens, outputs, seed=3), "gelu"
        )


@every_set
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [None, numbers(2, 9, 33, seed=3)], ids=["", "residual"])
@pytest.mark.parametrize("bias", [None, numbers(33, seed=2)], ids=["", "bias"])
@pytest.mark.parametrize("scale", [1.0, 0.7], ids=["", "scale"])
def test_linear_options(scale, bias, residual, activation):
    check(native.linear, torch_linear, numbers(2, 9, 70), numbers(33, 70, seed=1), bias, residual, activation, scale)


@every_set
def test_relu_of_nan_and_infinity():
    x = mx.array([[np.nan], [np.inf], [-np.inf]])
    found = np.array(native.linear(x, mx.array([[1.0]]), activation="relu"))
    np.testing.assert_array_equal(found, [[np.nan], [np.inf], [0]])


@every_set
def test_results_do_not_depend_on_the_batch():
    x, weight, bias = (mx.array(numbers(*s, seed=i)) for i, s in enumerate([(600, 77), (41, 77), (41,)]))
    together = native.linear(x, weight, bias, None, "gelu")
    for part in (slice(0, 1), slice(5, 22), slice(255, 600)):
        assert mx.array_equal(native.linear(x[part], weight, bias, None, "gelu"), together[part])


@every_set
@wrappings
@pytest.mark.parametrize("scale", [1.0, 0.7], ids=["", "scale"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_linear(activation, scale, wrap):
    shapes = [(2, 19, 45), (33, 45), (33,), (2, 19, 33)]
    inputs = [numbers(*s, seed=i) for i, s in enumerate(shapes)]
    for n in (2, 3, 4):
        rest = [*[None] * (4 - n), activation, scale]
        ours, theirs = (lambda *x, f=f, rest=rest: f(*x, *rest) for f in (native.linear, torch_linear))
        check_gradients(ours, theirs, *inputs[:n], wrap=wrap)
