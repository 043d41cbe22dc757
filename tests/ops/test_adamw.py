"""The kernels of the optimizer, with each instruction set of this machine."""

from __future__ import annotations

import mlx.core as mx
import pytest
import torch

from mlx_esm_hf import ops
from tests.marks import needs_kernels
from tests.ops.reference import (
    hold,
    native,
    numbers,
)

pytestmark = [needs_kernels, pytest.mark.usefixtures("on_cpu")]
every_set = pytest.mark.usefixtures("instructions")
OF_STEP = mx.array(1.0), mx.array(0.1), mx.array(1, mx.uint64)  # scale, learning rate and step of AdamW


@every_set
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw(decay):
    """Ten steps, with a changing learning rate and scaled gradients."""
    start, gradients = numbers(37, 501), numbers(10, 37, 501, seed=1)

    def theirs(dtype: torch.dtype) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
        optimizer = torch.optim.AdamW([weight], weight_decay=decay, betas=(0.9, 0.98), eps=1e-8)
        for i, gradient in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = 1e-2 / (i + 1)
            weight.grad = torch.tensor(gradient, dtype=dtype) * 0.5
            optimizer.step()
        return weight

    weight, mean, square = mx.array(start), mx.zeros(start.shape), mx.zeros(start.shape)
    for i, gradient in enumerate(gradients):
        of_step = mx.array(0.5), mx.array(1e-2 / (i + 1)), mx.array(i + 1, mx.uint64)
        weight, mean, square = ops.adamw(weight, mx.array(gradient), mean, square, *of_step, (0.9, 0.98), 1e-8, decay)
    hold(weight, theirs(torch.float32), theirs(torch.float64))


@every_set
def test_adamw_does_not_change_arrays_that_are_held():
    """It works in place only if the array is not held elsewhere."""
    weight, held, ones = mx.array([1.0, 2.0]), mx.array([0.5, 0.5]), mx.ones(2)
    mx.eval(native.adamw(weight, ones, held, ones, *OF_STEP, 0.9, 0.98, 1e-8, 0.0))
    assert (weight.tolist(), held.tolist(), ones.tolist()) == ([1.0, 2.0], [0.5, 0.5], [1.0, 1.0])


@every_set
@pytest.mark.parametrize("size", [0, 1, 17, 100_003])
def test_sum_of_squares(size):
    x = numbers(size)
    theirs = [(torch.tensor(x, dtype=dtype) ** 2).sum() for dtype in (torch.float32, torch.float64)]
    hold(ops.sum_of_squares(mx.array(x)), *theirs)
