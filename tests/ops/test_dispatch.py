"""What `ops` passes to its backends."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_esm_hf import ops
from mlx_esm_hf.ops import cpu, dispatch, gpu
from tests.bar import hold_to_bar
from tests.marks import needs_kernels
from tests.ops.reference import (
    EPS,
    native,
    norm,
    numbers,
)


@pytest.mark.parametrize("batch_of_bias", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", [cpu, gpu], ids=["cpu", "gpu"])
def test_attention_with_a_bias(monkeypatch, backend, masked, batch_of_bias):
    """An additive bias, as in folding, with and without a mask."""
    monkeypatch.setattr(dispatch, "backend_of", lambda *arrays: backend)
    B, L, H, d = 3, 37, 4, 8
    query, key, value = (numbers(B, L, H * d, seed=i) for i in range(3))
    bias = numbers(batch_of_bias, H, L, L, seed=4, scale=2)
    mask = np.random.default_rng(5).random((B, L)) < 0.7 if masked else np.ones((B, L), bool)
    layout = ops.Layout((B, L), mx.array(mask)) if masked else None
    ours = ops.attention(*map(mx.array, (query, key, value)), H, layout, bias=mx.array(bias))

    def expected(dtype):
        q, k, v = (torch.tensor(x, dtype=dtype).unflatten(-1, (H, d)).transpose(1, 2) for x in (query, key, value))
        hidden = torch.tensor(np.where(mask, 0, -np.inf), dtype=dtype)[:, None, None]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, torch.tensor(bias, dtype=dtype) + hidden)

    merged = (x.transpose(1, 2).flatten(2) for x in (expected(torch.float32), expected(torch.float64)))
    hold_to_bar(ours, *merged)


@needs_kernels
@pytest.mark.usefixtures("on_cpu")
def test_kernels_and_cpu_backend_agree(monkeypatch):
    """Masks, angles and biases of a padded batch reach the kernels."""
    B, L, H, d = 3, 17, 4, 8
    query, key, value = (mx.array(numbers(B, L, H * d, seed=i)) for i in range(3))
    angles, bias = mx.array(numbers(B, L, d // 2, seed=3)), mx.array(numbers(B, H, L, L, seed=4))
    layout = ops.Layout((B, L), mx.array(np.random.default_rng(5).random((B, L)) < 0.7))
    learned = (mx.array(numbers(1, 1, H * d, seed=6)), mx.array(numbers(1, 1, H * d, seed=7)))
    weight, row = mx.array(numbers(9, H * d, seed=8)), mx.array(numbers(H * d, seed=9))
    residual = mx.array(numbers(B, L, 9, seed=10))
    calls = [
        lambda: ops.attention(query, key, value, H, layout, (mx.cos(angles), mx.sin(angles)), None, bias),
        lambda: ops.attention(query, key, value, H, layout, None, learned),
        lambda: ops.attention(query, key, value, H, layout, (mx.cos(angles), mx.sin(angles)), norms=(row, row, EPS)),
        lambda: ops.linear(query, weight, None, residual, "relu"),
        lambda: ops.linear(query, weight, row[:9], residual, "gelu", 0.7),
        lambda: ops.layer_norm(query, row, None, EPS),
        lambda: ops.layer_norm(query, row, row, EPS),
        lambda: ops.swiglu(query, key),
    ]
    for call in calls:
        monkeypatch.setattr(dispatch, "backend_of", lambda *arrays: native)
        ours = call()
        monkeypatch.setattr(dispatch, "backend_of", lambda *arrays: cpu)
        assert norm(ours - call()) <= 1e-5
