"""What the trunk of a folding network does to the states of pairs of residues, [B, L, L, C], `z` below.

Each operation begins with a layer norm, whose result is called z' here, and may add a residual. Layers and norms are
given as (weight, bias), of which the bias may be None. On Linux CPUs an operation is one kernel, between whose steps
only a few pairs are in memory. Elsewhere, and for gradients, it is what is spelled out here, some rows of pairs at a
time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_esm_hf import ops
from mlx_esm_hf.ops import kernels
from mlx_esm_hf.runtime.memory import evaluate

Layer = tuple[mx.array, mx.array | None]

EPS = 1e-5  # of the layer norms

SMALL = 1 << 17  # numbers of a weight that stays in a processor's cache

# Numbers that an operation makes at a time (16 MB): what stays in the cache is faster, and bounds the memory.
NUMBERS_AT_A_TIME = 1 << 22


def by_rows(function: Callable[..., mx.array], rows: int, *arrays: mx.array | None) -> mx.array:
    """function(*arrays), of `rows` rows [B, rows, ...] at a time."""
    L = next(x for x in arrays if x is not None).shape[1]
    if rows >= L:
        return function(*arrays)
    results = []
    for first in range(0, L, rows):
        results.append(function(*(None if x is None else x[:, first : first + rows] for x in arrays)))
        evaluate(results[-1])  # left to itself, MLX has the inside of several in memory
    return mx.concatenate(results, axis=1)


def rows_at_a_time(numbers: int) -> int:
    """How many, of which each makes so many numbers."""
    return max(1, NUMBERS_AT_A_TIME // numbers)


def computed(kernel: Callable[..., mx.array], plain: Callable[..., mx.array], *arrays: Any) -> mx.array:
    """kernel(*arrays) where there are kernels, with the gradient of plain(*arrays); elsewhere plain(*arrays).

    Its dtype is that of the first array.
    """
    dtype, arrays = arrays[0].dtype, tuple(ops.upcast(*arrays))
    if ops.backend_of(*arrays) is not kernels:
        return plain(*arrays)
    given = [x for x in arrays if x is not None]

    def all_of(function: Callable[..., mx.array], given: tuple[mx.array, ...]) -> mx.array:
        rest = iter(given)
        return function(*(None if x is None else next(rest) for x in arrays))

    function: Any = mx.custom_function(lambda *given: all_of(kernel, given))
    function.vjp(lambda given, dy, _: mx.vjp(lambda *given: all_of(plain, given), list(given), [dy])[1])
    return function(*given).astype(dtype)


def gated_linear(
    z: mx.array,
    norm: Layer,
    gate: Layer,
    layer: Layer,
    x: mx.array | None = None,
    x_norm: Layer | None = None,
    mask: mx.array | None = None,
    residual: mx.array | None = None,
    channels_first: bool = False,
) -> mx.array:
    """sigmoid(gate(z')) · layer(z') · mask + residual; where there is an x, layer(x_norm(x)) instead of layer(z').

    Args:
        x: [C, B, L, L].
        mask: [B, L, L].
        residual: [B, L, L, outputs]; not with `channels_first`.

    Returns:
        [B, L, L, outputs], or [outputs, B, L, L] with `channels_first`.
    """

    def kernel(z, norm, norm_bias, gate, gate_bias, layer, layer_bias, x, x_norm, x_norm_bias, mask, residual):
        of_x = None if x is None else (x_norm, x_norm_bias, EPS)
        layers = (norm, norm_bias, EPS), (gate, gate_bias), (layer, layer_bias)
        return kernels.gated_linear(z, *layers, x, of_x, mask, residual, channels_first)

    def plain(z, norm, norm_bias, gate, gate_bias, layer, layer_bias, x, x_norm, x_norm_bias, mask, residual):
        def step(z, x, mask, residual):
            z = ops.layer_norm(z, norm, norm_bias, EPS)
            x = z if x is None else ops.layer_norm(x, x_norm, x_norm_bias, EPS)
            y = ops.linear(x, layer, layer_bias) * mx.sigmoid(ops.linear(z, gate, gate_bias))
            y = y if mask is None else y * mask[..., None]
            return y if residual is None else y + residual

        x = None if x is None else mx.moveaxis(x, 0, -1)
        y = by_rows(step, rows_at_a_time(z[:, :1].size), z, x, mask, residual)
        return mx.moveaxis(y, -1, 0) if channels_first else y

    return computed(kernel, plain, z, *norm, *gate, *layer, x, *(x_norm or (None, None)), mask, residual)


def triangle_attention(
    z: mx.array,
    mask: mx.array,
    norm: Layer,
    bias: mx.array,
    query: mx.array,
    key: mx.array,
    value: mx.array,
    gate: Layer,
    output: Layer,
    residual: mx.array | None = None,
    ending: bool = False,
    rows: int | None = None,
) -> mx.array:
    """In each row of pairs, output(sigmoid(gate(z')) · attention of z' with a bias that all rows share) + residual.

    Args:
        mask: [B, L], 0 for a residue that is hidden as a key.
        bias: [H, C], from z' to the bias of each head, which is that of query j and key k in all rows for z'_jk.
        query, key, value: [C, C].
        ending: rows and columns of z are exchanged before and after.
        rows: how many to compute at a time, outside of the kernel; None, as many as `NUMBERS_AT_A_TIME` allows.

    Returns:
        [B, L, L, C].
    """

    def kernel(z, mask, norm, norm_bias, bias, query, key, value, gate, gate_bias, output, output_bias, residual):
        return kernels.triangle_attention(
            z, mask, (norm, norm_bias, EPS), bias, query, key, value, (gate, gate_bias), (output, output_bias),
            residual, ending,
        )  # fmt: skip

    def plain(z, mask, norm, norm_bias, bias, query, key, value, gate, gate_bias, output, output_bias, residual):
        if ending:
            z, residual = z.swapaxes(1, 2), None if residual is None else residual.swapaxes(1, 2)
        wide = rows_at_a_time(z[:, :1].size)
        added = by_rows(lambda z: ops.linear(ops.layer_norm(z, norm, norm_bias, EPS), bias), wide, z)
        # A finite number: in rows of nothing but padding −∞ would become NaN, which spreads.
        added = added.transpose(0, 3, 1, 2) + (1e9 * (mask.astype(z.dtype) - 1))[:, None, None, :]

        def step(z, residual):
            z = ops.layer_norm(z, norm, norm_bias, EPS)
            q, k, v = (mx.unflatten(ops.linear(z, w), -1, (len(bias), -1)).swapaxes(2, 3) for w in (query, key, value))
            q = q * q.shape[-1] ** -0.5
            attend = ops.plain_backend().scaled_dot_product_attention
            y = mx.stack([attend(q[b], k[b], v[b], None, added[b : b + 1]) for b in range(len(z))])
            y = y.swapaxes(2, 3).flatten(3) * mx.sigmoid(ops.linear(z, gate, gate_bias))
            return ops.linear(y, output, output_bias, residual)

        y = by_rows(step, rows or rows_at_a_time(added.size), z, residual)
        return y.swapaxes(1, 2) if ending else y

    return computed(kernel, plain, z, mask, *norm, bias, query, key, value, *gate, *output, residual)


def transition(
    x: mx.array, norm: Layer, expand: Layer, shrink: Layer, residual: mx.array | None = None, rows: int | None = None
) -> mx.array:
    """shrink(ReLU(expand(x'))) + residual, [B, L, ..., C].

    Args:
        rows: as in `triangle_attention`.
    """

    def kernel(x, norm, norm_bias, expand, expand_bias, shrink, shrink_bias, residual):
        return kernels.transition(x, (norm, norm_bias, EPS), (expand, expand_bias), (shrink, shrink_bias), residual)

    def plain(x, norm, norm_bias, expand, expand_bias, shrink, shrink_bias, residual):
        def step(x, residual):
            x = ops.layer_norm(x, norm, norm_bias, EPS)
            return ops.linear(ops.linear(x, expand, expand_bias, activation="relu"), shrink, shrink_bias, residual)

        return by_rows(step, rows or rows_at_a_time(len(expand) * x[:, :1, ..., 0].size), x, residual)

    arrays = x, *norm, *expand, *shrink, residual
    # The kernel reads the weights again for every few tokens, which they have to be small for.
    return computed(kernel, plain, *arrays) if expand[0].size <= SMALL else plain(*arrays)
