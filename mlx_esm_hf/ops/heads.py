"""Steps around attention: splitting features into heads, rotary positions, the learned key and value of ESM-1."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_esm_hf.ops.layout import Layout

Rotary = tuple[mx.array, mx.array]  # cosines, sines
Norms = tuple[mx.array, mx.array, float]  # weights of the layer norms of query and key, eps


class Heads(NamedTuple):
    """Arguments of a backend's `scaled_dot_product_attention`. The query is scaled; query and key are rotated."""

    query: mx.array  # [B, H, L, d]
    key: mx.array  # [B, H, S, d]; S is L, or L + 1 with a learned key
    value: mx.array  # [B, H, S, d]
    mask: mx.array | None  # bool [B, 1, 1, S], or [B, 1, L, S] with chains; False hides a key


def split_heads(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    heads: int,
    layout: Layout | None = None,
    rotary: Rotary | None = None,
    bias_kv: tuple[mx.array, mx.array] | None = None,
) -> Heads:
    """Split [B, L, D] into heads [B, heads, L, D / heads], then scale and rotate. Arguments as in `ops.attention`."""
    mask = None if layout is None else layout.visible
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 3 else mask[:, None, None]
    if bias_kv is not None:
        B, _, D = key.shape
        bias_k, bias_v = (mx.broadcast_to(bias.reshape(1, 1, D), (B, 1, D)) for bias in bias_kv)
        key, value = mx.concatenate([key, bias_k], axis=1), mx.concatenate([value, bias_v], axis=1)
        if mask is not None:
            mask = mx.pad(mask, [(0, 0), (0, 0), (0, 0), (0, 1)], constant_values=True)

    query, key, value = (mx.unflatten(x, -1, (heads, -1)).swapaxes(1, 2) for x in (query, key, value))
    query = query * query.shape[-1] ** -0.5
    if rotary is not None:
        query, key = apply_rotary_pos_emb(query, *rotary), apply_rotary_pos_emb(key, *rotary)
    return Heads(query, key, value, mask)


def merge_heads(x: mx.array) -> mx.array:
    """Merge heads: [B, heads, L, d] to [B, L, heads · d]."""
    return x.swapaxes(1, 2).flatten(2)


def apply_rotary_pos_emb(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate each head of x by the angle of its position.

    The two halves of a head are the coordinates. The rotation is computed in float32, the dtype of cos and sin.

    Args:
        x: [B, H, L, d].
        cos: cosines of the angles, [B, L, d / 2].
        sin: sines of the angles, [B, L, d / 2].

    Source: Su et al. (2021).
    """
    cos, sin = cos[:, None], sin[:, None]
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]  # not mx.split: it breaks mx.compile of two forward passes
    return mx.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
