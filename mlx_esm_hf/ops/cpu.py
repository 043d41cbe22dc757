"""Linux CPUs: compositions of MLX operations that avoid those whose CPU loops are slow.

`mx.erf` takes about 45 ns an element and `mx.exp`, inside `mx.softmax` or alone, about 20, where a multiplication
takes 0.6. So both functions are spelled out in additions and multiplications, at float32's own accuracy. Other
dtypes keep MLX's operations.
"""

from __future__ import annotations

import math

import mlx.core as mx

# Scores of attention that are held at a time, in elements: memory blocks over 32 MB are mapped and faulted in anew
# by glibc at each operation, which costs more than the operation.
SCORES_AT_A_TIME = 1 << 22

# erf(x) = x P(x²) / Q(x²) on |x| <= 3.9, where 1 - erf(3.9) is below half a unit in the last place of float32. Both
# were fitted by weighted least squares on 2,000 Chebyshev nodes; largest error 4.1e-8.
ERF_P = (1.1283788007645699, 0.2042058945473353, 0.05114631023533651, 0.0038953781956732833, 0.00014744623056976402,
         -1.9966777250501772e-06, 2.0116805589305215e-08)  # fmt: skip
ERF_Q = (1.0, 0.5143017856775183, 0.11677757383413301, 0.01472877777985953, 0.0010063603027180435)

# 2^f on |f| <= 1/2, fitted alike; largest relative error 7.5e-8.
EXP2 = (1.0000000716542266, 0.6931469670506254, 0.24022119725322993, 0.05550713296586601, 0.009675541274876368,
        0.0013276464528452075)  # fmt: skip
ROUND = 1.5 * 2**23  # adding it leaves the nearest integer in the low bits of a float32


def _polynomial(coefficients: tuple[float, ...], x: mx.array) -> mx.array:
    y = coefficients[-1] * x + coefficients[-2]
    for c in coefficients[-3::-1]:
        y = y * x + c
    return y


def _erf(x: mx.array) -> mx.array:
    x = mx.clip(x, -3.9, 3.9)
    squared = x * x
    return x * _polynomial(ERF_P, squared) / _polynomial(ERF_Q, squared)


@mx.custom_function
def _gelu(x: mx.array) -> mx.array:
    return x * (0.5 * _erf(x * math.sqrt(0.5)) + 0.5)


@_gelu.vjp
def _gelu_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    density = mx.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
    return cotangent * (0.5 * _erf(x * math.sqrt(0.5)) + 0.5 + x * density)


@mx.custom_function
def _exp(x: mx.array) -> mx.array:
    """e^x for x <= 0; what would be smaller than float32's smallest normal number becomes that number."""
    t = mx.maximum(x * math.log2(math.e), -126.0)
    shifted = t + ROUND
    power = _polynomial(EXP2, t - (shifted - ROUND))
    return (power.view(mx.int32) + (shifted.view(mx.int32) << 23)).view(mx.float32)


@_exp.vjp
def _exp_vjp(_: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output


def gelu(x: mx.array) -> mx.array:
    if x.dtype == mx.float32:
        return _gelu(x)  # type: ignore[return-value]
    return x * (1 + mx.erf(x * math.sqrt(0.5))) / 2


def _softmax_terms(scores: mx.array) -> tuple[mx.array, mx.array]:
    """Numerator and denominator. The sum is a product with ones: BLAS sums in blocks, `mx.sum` one by one."""
    terms: mx.array = _exp(scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True)))  # type: ignore[assignment]
    return terms, terms @ mx.ones((scores.shape[-1], 1))


def softmax(x: mx.array) -> mx.array:
    if x.dtype != mx.float32:
        return mx.softmax(x, axis=-1, precise=True)
    terms, total = _softmax_terms(x)
    return terms / total


def _attention(query: mx.array, key: mx.array, value: mx.array, bias: mx.array) -> mx.array:
    key = key.swapaxes(-1, -2)
    scores = mx.addmm(bias, query, key) if bias.size else query @ key
    if scores.dtype != mx.float32:
        return softmax(scores) @ value
    terms, total = _softmax_terms(scores)
    return (terms @ value) / total


def scaled_dot_product_attention(query: mx.array, key: mx.array, value: mx.array, mask: mx.array | None) -> mx.array:
    B, H, L, _ = query.shape
    S = key.shape[2]
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    if mask is None:
        bias = mx.zeros((B * H, 0, 0))
    else:
        bias = mx.where(mask, 0.0, mx.finfo(query.dtype).min).astype(query.dtype)
        bias = mx.broadcast_to(bias, (B, H, bias.shape[2], S)).flatten(0, 1)
    heads = max(1, SCORES_AT_A_TIME // (L * S))
    blocks = (slice(i, i + heads) for i in range(0, B * H, heads))
    parts = [_attention(query[b], key[b], value[b], bias[b]) for b in blocks]
    return mx.unflatten(mx.concatenate(parts), 0, (B, H))
