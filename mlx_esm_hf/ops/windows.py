"""Attention of each token to the tokens near it in the sequence."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_esm_hf.ops import kernels
from mlx_esm_hf.ops.dispatch import backend_of, plain_backend, upcast


def windowed_attention(
    query: mx.array, key: mx.array, value: mx.array, heads: int, half_window: int, visible: mx.array | None = None
) -> mx.array:
    """Return multi-head attention in which token i sees the tokens j with |i − j| ≤ `half_window`.

    Args:
        query: [B, L, D], split into heads of d = D / heads. Scores are divided by √d.
        key: [B, L, D].
        value: [B, L, D].
        heads: number of heads.
        half_window: largest distance of a visible token, at least 1.
        visible: [B or 1, L], False for tokens that no token sees.

    Returns:
        [B, L, D]; 0 for tokens that see no token.
    """
    dtype = query.dtype
    B, L, _ = query.shape
    query, key, value = upcast(query, key, value)
    mask = None if visible is None else mx.broadcast_to(visible.astype(mx.bool_), (B, L))

    def plain(query: mx.array, key: mx.array, value: mx.array) -> mx.array:
        return in_blocks(query, key, value, heads, half_window, mask)

    if backend_of(query, key, value) is not kernels.native:
        return plain(query, key, value).astype(dtype)
    offsets = [L * row for row in range(B + 1)]
    flat = None if mask is None else mask.flatten()

    def kernel(query: mx.array, key: mx.array, value: mx.array) -> mx.array:
        return kernels.native.windowed_attention(query, key, value, heads, offsets, half_window, flat)

    fused: Any = mx.custom_function(kernel)
    fused.vjp(lambda inputs, dy, _: mx.vjp(plain, list(inputs), [dy])[1])
    return fused(query, key, value).astype(dtype)


def in_blocks(
    query: mx.array, key: mx.array, value: mx.array, heads: int, half_window: int, visible: mx.array | None
) -> mx.array:
    """Return `windowed_attention` by MLX's operations.

    Blocks of `half_window` queries see three blocks of keys, so the scores of all pairs are never in memory.

    Args:
        query: this and the other arguments are those of `windowed_attention`.
        key: [B, L, D].
        value: [B, L, D].
        heads: number of heads.
        half_window: at least 1.
        visible: [B, L], or None.
    """
    B, L, D = query.shape
    size = min(half_window, L)
    blocks = -(-L // size)
    rest = blocks * size - L

    def split(x: mx.array, before: int = 0) -> mx.array:
        return mx.pad(x, [(0, 0), (before, rest + before), (0, 0)])

    def windows(x: mx.array) -> mx.array:
        """Return the three blocks [B, blocks, 3 · size, ...] around each block of x [B, L, ...]."""
        padded = mx.unflatten(split(x, size), 1, (blocks + 2, size))
        return mx.concatenate([padded[:, i : i + blocks] for i in range(3)], axis=2)

    def by_head(x: mx.array) -> mx.array:
        """Return x [B, blocks, n, D] as [B · blocks, heads, n, d]."""
        return mx.unflatten(x, -1, (heads, -1)).swapaxes(2, 3).flatten(0, 1)

    real = mx.ones((1, L), dtype=mx.bool_) if visible is None else visible.astype(mx.bool_)
    seen = windows(real[..., None])[..., 0]  # [B or 1, blocks, 3 size]
    distance = mx.arange(3 * size) - size - mx.arange(size)[:, None]
    mask = seen[:, :, None] & (mx.abs(distance) <= half_window)  # [B or 1, blocks, size, 3 size]
    mask = mx.broadcast_to(mask, (B, *mask.shape[1:])).flatten(0, 1)[:, None]
    q = by_head(mx.unflatten(split(query), 1, (blocks, size))) * (D // heads) ** -0.5
    y = plain_backend().scaled_dot_product_attention(q, by_head(windows(key)), by_head(windows(value)), mask)
    y = mx.where(mask.any(axis=-1, keepdims=True), y, 0)
    y = mx.unflatten(y, 0, (B, blocks)).swapaxes(2, 3).flatten(3).flatten(1, 2)
    return y[:, :L]
