"""Windowed attention and its gradients, with each instruction set and without kernels, against torch."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_esm_hf import ops
from tests.ops.test_pairs import backend, check, numbers  # noqa: F401


def exact(heads: int, half_window: int, visible: np.ndarray):
    """Return dense attention with a mask of the window; 0 for queries that see no key."""

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        B, L, D = inputs[0].shape
        query, key, value = (x.reshape(B, L, heads, -1).transpose(1, 2) for x in inputs)
        near = np.abs(np.arange(L)[:, None] - np.arange(L)) <= half_window
        mask = torch.tensor(near & np.broadcast_to(visible, (B, L))[:, None])[:, None]
        scores = (query @ key.transpose(2, 3) * (D // heads) ** -0.5).masked_fill(~mask, -1e30)
        y = (torch.softmax(scores, dim=-1) @ value) * mask.any(dim=-1, keepdim=True)
        return y.transpose(1, 2).reshape(B, L, D)

    return attend


@pytest.mark.parametrize("half_window", [1, 5, 64])
@pytest.mark.parametrize("length", [1, 23, 150])
@pytest.mark.parametrize("rows", [1, 3], ids=["one mask", "a mask for each row"])
def test_windowed_attention(half_window: int, length: int, rows: int) -> None:
    inputs = [numbers(3, length, 12, seed=seed) for seed in range(3)]
    visible = np.arange(length) < np.array([[length], [max(1, length // 3)], [max(1, length - 2)]])[:rows]

    def ours(*arrays: mx.array) -> mx.array:
        return ops.windowed_attention(*arrays, 2, half_window, mx.array(visible))

    check(ours, exact(2, half_window, visible), inputs)


def test_without_a_mask() -> None:
    inputs = [numbers(2, 30, 12, seed=seed) for seed in range(3)]
    check(lambda *x: ops.windowed_attention(*x, 3, 4), exact(3, 4, np.ones((1, 30), bool)), inputs)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision(dtype: mx.Dtype) -> None:
    q, k, v = (mx.array(numbers(2, 30, 12, seed=seed)) for seed in range(3))
    half = ops.windowed_attention(*(x.astype(dtype) for x in (q, k, v)), 3, 4)
    assert half.dtype == dtype
    np.testing.assert_allclose(np.array(half.astype(mx.float32)), ops.windowed_attention(q, k, v, 3, 4), atol=0.05)


def test_sigmoid() -> None:
    x, gate = numbers(3, 1000, scale=4.0), numbers(3, 1000, seed=1, scale=20.0)
    check(lambda x, g: ops.sigmoid_gate(x, g), lambda x, g: x * torch.sigmoid(g), [x, gate])
    check(lambda x, g: x + ops.sigmoid(g), lambda x, g: x + torch.sigmoid(g), [x, gate])
