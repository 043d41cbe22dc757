"""Each operation on the CPU against float64, held to what torch's float32 reaches."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_esm_hf import ops
from mlx_esm_hf.ops import attention_probabilities as probabilities
from mlx_esm_hf.ops import cpu, dispatch, gpu
from tests.bar import hold_to_bar
from tests.marks import needs_cpu


def numbers(*shape, scale=1.0, seed=0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("scale", [0.1, 1, 3, 30])
def test_gelu(scale):
    x = numbers(1000, 128, scale=scale)
    # As transformers' ESM spells it in float32, which is torch's own bar.
    hold_to_bar(
        cpu.gelu(mx.array(x)),
        torch.tensor(x) * 0.5 * (1 + torch.erf(torch.tensor(x) / 2**0.5)),
        torch.nn.functional.gelu(torch.tensor(x, dtype=torch.float64)),
        ratio=2,
        floor=1e-8,
    )


def test_gelu_far_out():
    x = mx.array([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, -40.0])
    assert np.allclose(np.array(cpu.gelu(x)), [0, 0, 5e-31, -5e-31, 1e4, 0, 0], rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, pytest.param(mx.float64, marks=needs_cpu)])
def test_other_dtypes_keep_theirs(dtype):
    x = mx.array(numbers(4, 8)).astype(dtype)
    assert cpu.gelu(x).dtype == cpu.softmax(x).dtype == dtype
    q = mx.array(numbers(1, 2, 5, 8)).astype(dtype)
    assert cpu.scaled_dot_product_attention(q, q, q, None).dtype == dtype


@pytest.mark.parametrize(
    ("rows", "columns", "scale"), [(7, 1, 1), (5, 3, 1), (200, 300, 4), (20, 4000, 1), (9, 50, 60)]
)
def test_softmax(rows, columns, scale):
    x = numbers(rows, columns, scale=scale)
    float32, float64 = torch.tensor(x), torch.tensor(x, dtype=torch.float64)
    hold_to_bar(cpu.softmax(mx.array(x)), float32.softmax(-1), float64.softmax(-1), scale=1.0, floor=3e-7)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "L", "S", "d"),
    [(1, 1, 1, 1, 16), (2, 3, 7, 8, 16), (3, 4, 300, 301, 32), (1, 4, 1022, 1022, 64), (1, 1, 2100, 2101, 16)],
)
def test_attention_in_blocks(B, H, L, S, d, masked):
    query, key, value = (numbers(B, n, H, d, seed=i).swapaxes(1, 2) for i, n in enumerate((L, S, S)))
    mask = np.random.default_rng(3).random((B, 1, 1, S)) < 0.7
    mask[..., 0] = True
    mask = mask if masked else None
    visible = None if mask is None else torch.tensor(mask)
    inputs = [mx.array(x * s) for x, s in ((query, d**-0.5), (key, 1), (value, 1))]
    expected = [
        torch.nn.functional.scaled_dot_product_attention(
            *(torch.tensor(x * s, dtype=t) for x, s in ((query, d**-0.5), (key, 1), (value, 1))), visible, scale=1.0
        )
        for t in (torch.float32, torch.float64)
    ]
    ours = cpu.scaled_dot_product_attention(*inputs, None if mask is None else mx.array(mask))
    hold_to_bar(ours, *expected)
    through = probabilities(inputs[0], inputs[1], None if mask is None else mx.array(mask)) @ inputs[2]
    assert np.abs(np.array(through) - np.array(ours)).max() <= 1e-5


@pytest.mark.parametrize("batch_of_bias", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", [cpu, gpu], ids=["cpu", "gpu"])
def test_attention_with_a_bias(monkeypatch, backend, masked, batch_of_bias):
    """An additive bias, as folding has it, beside the mask."""
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


def test_gradients_are_those_of_mlx():
    q, k, v = (mx.array(numbers(2, 3, 9, 8, seed=i)) for i in range(3))

    def loss(backend):
        return lambda *x: (backend.gelu(backend.scaled_dot_product_attention(*x, None)) ** 2).sum()

    ours, theirs = (mx.grad(loss(b), argnums=(0, 1, 2))(q, k, v) for b in (cpu, gpu))
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(np.array(a) - np.array(b)).max() <= 1e-5
