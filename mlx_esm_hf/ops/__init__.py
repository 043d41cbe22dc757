"""Operations on arrays that have a best way on each device; which one is taken is decided here and nowhere else.

`kernels` are our own, for float32 on Linux CPUs where they could be built; `cpu` has compositions of MLX's operations,
`gpu` MLX's fused ones.
"""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx
import numpy as np

from mlx_esm_hf.ops import cpu, gpu, kernels
from mlx_esm_hf.ops.heads import Rotary, merge_heads, split_heads
from mlx_esm_hf.ops.packing import Packing

__all__ = [
    "Packing",
    "attention",
    "attention_probabilities",
    "gelu",
    "layer_norm",
    "linear",
    "merge_heads",
    "packing",
    "softmax",
    "split_heads",
]


def _backend(*arrays: mx.array | None) -> ModuleType:
    """The best one on the default device for arrays of these dtypes."""
    if mx.default_device() != mx.cpu:
        return gpu
    if kernels.native is None or any(x is not None and x.dtype != mx.float32 for x in arrays):
        return cpu
    return kernels


def linear(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    residual: mx.array | None = None,
    gelu: bool = False,
) -> mx.array:
    """x · weightᵀ + bias, then GELU if asked for, then + residual.

    Args:
        x: [..., inputs].
        weight: [outputs, inputs].
        bias: [outputs].
        residual: [..., outputs].
    """
    backend = _backend(x, weight, bias, residual)
    if backend is kernels:
        return kernels.native.linear(x, weight, bias, residual, gelu)
    y = x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
    if gelu:
        y = backend.gelu(y)
    return y if residual is None else y + residual


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Layer norm over the last axis (Ba et al. 2016), `eps` inside the root."""
    if _backend(x, weight, bias) is kernels:
        return kernels.native.layer_norm(x, weight, bias, eps)
    return mx.fast.layer_norm(x, weight, bias, eps)


def gelu(x: mx.array) -> mx.array:
    """x · Φ(x) by the exact error function, as ESM has it (not the tanh approximation)."""
    backend = _backend(x)
    return kernels.native.gelu(x) if backend is kernels else backend.gelu(x)


def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis, summed in float32 or better; the result has the dtype of `x`."""
    backend = _backend(x)
    return kernels.native.softmax(x) if backend is kernels else backend.softmax(x)


def attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    heads: int,
    mask: mx.array | Packing | None = None,
    rotary: Rotary | None = None,
    bias_kv: tuple[mx.array, mx.array] | None = None,
) -> mx.array:
    """Multi-head attention, softmax(rotate(query / √d) · rotate(key)ᵀ) · value in each head.

    Args:
        query, key, value: [B, L, D], d = D / heads.
        mask: bool [B, 1, 1, L]; False hides a key. At least one key of each row has to be seen. Or the `Packing` of a
            packed batch (B = 1), each of whose sequences sees itself.
        rotary: cosines and sines of the angles of each position, [B, L, d / 2].
        bias_kv: a key and a value, D numbers each, that every sequence has besides its own (ESM-1).

    Returns:
        [B, L, D].
    """
    backend = _backend(query, key, value, *(rotary or ()), *(bias_kv or ()))
    if backend is kernels:
        return kernels.attention(query, key, value, heads, mask, rotary, bias_kv)
    assert not isinstance(mask, Packing), "`packing` packs for the kernels alone"
    split = split_heads(query, key, value, heads, mask, rotary, bias_kv)
    return merge_heads(backend.scaled_dot_product_attention(*split))


def attention_probabilities(query: mx.array, key: mx.array, mask: mx.array | None) -> mx.array:
    """The probabilities of attention, from what `split_heads` returns: [B, H, L, S]."""
    scores = query @ key.swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return softmax(scores)


def packing(mask: np.ndarray | None, dtype: mx.Dtype) -> Packing | None:
    """How to compute a batch in `dtype`, real where `mask` [B, L] says, on its real tokens only.

    None where padding has to stay: on a GPU, whose kernels take rectangles; without our kernels; and where the mask is
    not known (None, under `mx.compile`) or has no padding.
    """
    if mask is None or mask.all() or dtype != mx.float32 or _backend() is not kernels:
        return None
    return Packing(mask.astype(bool))
