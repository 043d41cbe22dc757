"""The backend for CPUs: compositions of MLX operations that avoid the slow ones.

On a CPU, `mx.erf` takes about 45 ns per element and `mx.exp`, alone or in `mx.softmax`, about 20 ns; a multiplication
takes 0.6 ns. Both functions are therefore written as additions and multiplications, with the accuracy of float32. Other
dtypes use MLX's operations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import mlx.core as mx

# Attention scores computed at a time, in elements (4 MB). They stay in the processor's cache: for ESM-2 8M and 600
# residues this takes half the time of 16 MB.
SCORES_AT_A_TIME = 1 << 20

SUM_BLOCK = 32

# The upper tail of the normal distribution for a >= 0 is e^(-a²/2) P(a) / Q(a). Fitted by weighted least squares on
# 1,200 Chebyshev nodes of [0, 6]. The error of a times the tail is at most 6.9e-9.
TAIL_P = (0.5000004313331821, 0.19536151675441155, 0.03707046742248422, -0.00010750251376181039)
TAIL_Q = (1.0, 1.1886239477562983, 0.5224212044247064, 0.088594318123727)

# 2^f for |f| <= 1/2, fitted in the same way. The largest relative error is 7.5e-8.
EXP2 = (1.0000000716542266, 0.6931469670506254, 0.24022119725322993, 0.05550713296586601, 0.009675541274876368,
        0.0013276464528452075)  # fmt: skip
ROUND = 1.5 * 2**23 + 127  # after adding it, the low bits of a float32 hold the nearest integer and an exponent's bias


def _polynomial(coefficients: tuple[float, ...], x: mx.array) -> mx.array:
    """Return the polynomial in x with these coefficients, constant term first."""
    y = coefficients[-1] * x + coefficients[-2]
    for c in coefficients[-3::-1]:
        y = y * x + c
    return y


def _exp2(t: mx.array) -> mx.array:
    """Return 2^t for t <= 0, at least the smallest normal float32. NaN stays NaN, as 2^n is a factor."""
    t = mx.maximum(t, -126.0)
    shifted = t + ROUND
    power = _polynomial(EXP2, t - (shifted - ROUND))
    return power * (shifted.view(mx.int32) << 23).view(mx.float32)


@mx.custom_function
def _exp(x: mx.array) -> mx.array:
    """Return e^x for x <= 0."""
    return _exp2(x * math.log2(math.e))


@_exp.vjp
def _exp_vjp(_: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output


def _normal(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return |x|, e^(-x²/2) and the tail Φ(-|x|)."""
    size = mx.minimum(mx.abs(x), 12.0)  # there the tail is 2e-33, and P and Q do not overflow
    bell = _exp2(size * size * (-0.5 * math.log2(math.e)))
    return size, bell, bell * (_polynomial(TAIL_P, size) / _polynomial(TAIL_Q, size))


@mx.custom_function
def _gelu(x: mx.array) -> mx.array:
    """Return x Φ(x), computed as max(x, 0) - |x| Φ(-|x|), which avoids cancellation. -inf becomes NaN, as in torch."""
    size, _, tail = _normal(x)
    return mx.where(x > 0, x, x * 0) - size * tail


@_gelu.vjp
def _gelu_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    _, bell, tail = _normal(x)
    return cotangent * (mx.where(x > 0, 1 - tail, tail) + mx.clip(x, -12.0, 12.0) * bell * (1 / math.sqrt(2 * math.pi)))


def gelu(x: mx.array) -> mx.array:
    """Compute `ops.gelu`."""
    if x.dtype == mx.float32:
        return _gelu(x)  # type: ignore[return-value]
    if x.dtype == mx.float64:
        return x * (1 + mx.erf(x * math.sqrt(0.5))) / 2
    return _gelu(x.astype(mx.float32)).astype(x.dtype)  # type: ignore[attr-defined]


def _exp_of_size(x: mx.array) -> mx.array:
    """Return e^-|x|, from which x / (1 + e^-x) and its gradient are built because it cannot overflow."""
    return _exp2(mx.abs(x) * -math.log2(math.e))


@mx.custom_function
def _silu(x: mx.array) -> mx.array:
    small = _exp_of_size(x)
    return mx.where(x > 0, x, x * small) / (1 + small)


@_silu.vjp
def _silu_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    small = _exp_of_size(x)
    sigmoid = mx.where(x > 0, 1.0, small) / (1 + small)
    return cotangent * (sigmoid + output * (1 - sigmoid))


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Compute `ops.swiglu`."""
    if gate.dtype == mx.float64:
        return gate * mx.sigmoid(gate) * up
    silu: mx.array = _silu(gate.astype(mx.float32))  # type: ignore[assignment]
    return silu.astype(gate.dtype) * up


def _sum(x: mx.array) -> mx.array:
    """Return the sum over the last axis, which is kept. Summing in blocks first loses less precision."""
    x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % SUM_BLOCK)])
    # One large product: a batch of small ones would be as many BLAS calls.
    sums = x.reshape(-1, SUM_BLOCK) @ mx.ones((SUM_BLOCK, 1))
    return sums.reshape(*x.shape[:-1], -1).sum(axis=-1, keepdims=True)


def _mean(x: mx.array) -> mx.array:
    return _sum(x) / x.shape[-1]


def _centre(x: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """Return x minus its mean, and 1 / its standard deviation.

    At a width of 320 the error is a third of that of `mx.mean`, which sums element by element.
    """
    centred = x - _mean(x)
    return centred, mx.rsqrt(_mean(centred * centred) + eps)


@functools.cache
def _normalize(eps: float) -> Callable[[mx.array], mx.array]:
    @mx.custom_function
    def normalize(x: mx.array) -> mx.array:
        centred, scale = _centre(x, eps)
        return centred * scale

    @normalize.vjp
    def normalize_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        _, scale = _centre(x, eps)
        return scale * (cotangent - _mean(cotangent) - output * _mean(cotangent * output))

    return normalize  # type: ignore[return-value]


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array | None, eps: float) -> mx.array:
    """Compute `ops.layer_norm`."""
    if x.dtype != mx.float32:
        return mx.fast.layer_norm(x, weight, bias, eps)
    y = _normalize(eps)(x) * weight
    return y if bias is None else y + bias


def _softmax_terms(scores: mx.array) -> tuple[mx.array, mx.array]:
    """Return the numerator and the denominator of the softmax over the last axis."""
    terms: mx.array = _exp(scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True)))  # type: ignore[assignment]
    return terms, _sum(terms)


def softmax(x: mx.array) -> mx.array:
    """Compute `ops.softmax`."""
    if x.dtype != mx.float32:
        return mx.softmax(x, axis=-1, precise=True)
    if x.size <= SCORES_AT_A_TIME:
        return _softmax(x)
    rows = x.reshape(-1, x.shape[-1])
    blocks = _blocks(len(rows), max(1, SCORES_AT_A_TIME // x.shape[-1]))
    return mx.concatenate([_softmax(rows[block]) for block in blocks]).reshape(x.shape)


def _softmax(x: mx.array) -> mx.array:
    terms, total = _softmax_terms(x)
    return terms / total


def _attention(query: mx.array, key: mx.array, value: mx.array, added: mx.array | None) -> mx.array:
    key = key.swapaxes(-1, -2)
    scores = query @ key if added is None else mx.addmm(added, query, key)
    if scores.dtype != mx.float32:
        return softmax(scores) @ value
    terms, total = _softmax_terms(scores)
    return (terms @ value) / total


def scaled_dot_product_attention(
    query: mx.array, key: mx.array, value: mx.array, mask: mx.array | None, bias: mx.array | None = None
) -> mx.array:
    """Return attention [B, H, L, d] of heads from `split_heads`, with a bias [B or 1, H, L, S] added to the scores."""
    B, H, L, _ = query.shape
    S = key.shape[2]
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    added = _added_to_scores(mask, bias, query.dtype)
    if added is not None:
        added = mx.broadcast_to(added, (B, H, added.shape[2], S)).flatten(0, 1)
    rows = max(1, min(L, SCORES_AT_A_TIME // S))
    heads = max(1, SCORES_AT_A_TIME // (rows * S))
    parts = []
    for h in _blocks(B * H, heads):
        blocks = []
        for r in _blocks(L, rows):
            of_rows = added
            if added is not None:
                of_rows = added[h, r] if added.shape[1] > 1 else added[h]  # padding is hidden from every query
            blocks.append(_attention(query[h, r], key[h], value[h], of_rows))
        parts.append(mx.concatenate(blocks, axis=1))
    return mx.unflatten(mx.concatenate(parts), 0, (B, H))


def _added_to_scores(mask: mx.array | None, bias: mx.array | None, dtype: mx.Dtype) -> mx.array | None:
    """Return the mask [B, 1, 1 or L, S] and the bias [B or 1, H, L, S] as one array to add to the scores, or None."""
    if mask is None:
        return bias
    return mx.where(mask, 0.0 if bias is None else bias, mx.finfo(dtype).min).astype(dtype)


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]
