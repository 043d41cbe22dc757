"""The backend for Metal and CUDA: MLX's own fused operations."""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx


@partial(mx.compile, shapeless=True)
def gelu(x: mx.array) -> mx.array:
    """Compute `ops.gelu`, in float32 even for half precision, as torch does. Rounding would lose half the digits."""
    y = x.astype(mx.float32) if x.dtype in (mx.float16, mx.bfloat16) else x
    return (y * (1 + mx.erf(y / math.sqrt(2))) / 2).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Compute `ops.swiglu`, in float32 even for half precision."""
    x = gate.astype(mx.float32) if gate.dtype in (mx.float16, mx.bfloat16) else gate
    return (x * mx.sigmoid(x)).astype(gate.dtype) * up


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array | None, eps: float) -> mx.array:
    """Compute `ops.layer_norm`."""
    return mx.fast.layer_norm(x, weight, bias, eps)


def softmax(x: mx.array) -> mx.array:
    """Compute `ops.softmax`."""
    return mx.softmax(x, axis=-1, precise=True)


def scaled_dot_product_attention(
    query: mx.array, key: mx.array, value: mx.array, mask: mx.array | None, bias: mx.array | None = None
) -> mx.array:
    """Return attention [B, H, L, d] of heads from `split_heads`, with a bias [B or 1, H, L, S] added to the scores."""
    if bias is not None:
        mask = bias if mask is None else mx.where(mask, bias, mx.finfo(query.dtype).min).astype(query.dtype)
    return mx.fast.scaled_dot_product_attention(query, key, value, scale=1.0, mask=mask)
