"""Operations on arrays that have a best way on each device; which one is taken is decided here and nowhere else.

What is not here (linear layers, layer norm, embeddings) is `mlx.nn`'s own, which is right on every device once a
BLAS is bound (`ops.blas`).
"""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx

from mlx_esm_hf.ops import blas, cpu, gpu


def prepare() -> None:
    """What the process needs before the first operation: a BLAS, and on a CPU a memory that is kept."""
    blas.bind()
    if _backend() is cpu:
        cpu.keep_freed_memory()


def _backend() -> ModuleType:
    return cpu if mx.default_device() == mx.cpu else gpu


def gelu(x: mx.array) -> mx.array:
    """x · Φ(x) by the exact error function, as ESM has it (not the tanh approximation)."""
    return _backend().gelu(x)


def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis, summed in float32 or better; the result has the dtype of `x`."""
    return _backend().softmax(x)


def scaled_dot_product_attention(query: mx.array, key: mx.array, value: mx.array, mask: mx.array | None) -> mx.array:
    """softmax(query · keyᵀ) · value for a query that is scaled already.

    Args:
        query: [B, H, L, d].
        key, value: [B, H, S, d].
        mask: bool [B, 1, 1, S]; False hides a key. At least one key of each row has to be seen.

    Returns:
        [B, H, L, d].
    """
    return _backend().scaled_dot_product_attention(query, key, value, mask)


def attention_probabilities(query: mx.array, key: mx.array, mask: mx.array | None) -> mx.array:
    """The softmax(query · keyᵀ) of `scaled_dot_product_attention` itself: [B, H, L, S]."""
    scores = query @ key.swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return softmax(scores)
