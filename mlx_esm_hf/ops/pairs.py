"""Operations on the pair states [B, L, L, C] of a folding network, called `z` below.

Each operation begins with a layer norm, whose result is called z' here, and can add a residual. On Linux CPUs each
operation is one kernel that holds only a few pairs in memory at a time. Elsewhere, and for gradients, it is computed as
written here, a few rows of pairs at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_esm_hf.ops import kernels
from mlx_esm_hf.ops.dispatch import backend_of, layer_norm, linear, plain_backend, swiglu, upcast
from mlx_esm_hf.runtime.memory import evaluate

EPS = 1e-5  # of the layer norms

CHANNEL_GROUPS = 2  # of a triangle multiplication; the edges of one group are in memory together

# Elements that an operation computes at a time (16 MB). This bounds the memory, and is faster: they stay in the cache.
ELEMENTS_AT_A_TIME = 1 << 22


class Affine(NamedTuple):
    """The parameters of a linear layer or a layer norm."""

    weight: mx.array
    bias: mx.array | None


def by_rows(function: Callable[..., mx.array], rows: int, *arrays: mx.array | None) -> mx.array:
    """Return function(*arrays), computed on `rows` rows of the arrays [B, L, ...] at a time."""
    L = next(x for x in arrays if x is not None).shape[1]
    if rows >= L:
        return function(*arrays)
    results = []
    for first in range(0, L, rows):
        results.append(function(*(None if x is None else x[:, first : first + rows] for x in arrays)))
        evaluate(results[-1])  # otherwise MLX holds the intermediates of several blocks in memory
    return mx.concatenate(results, axis=1)


def rows_at_a_time(elements: int) -> int:
    """Return how many rows to compute at a time if each needs this many elements."""
    return max(1, ELEMENTS_AT_A_TIME // elements)


def fused(
    kernel: Callable[..., mx.array], plain: Callable[..., mx.array], *arguments: mx.array | Affine | None
) -> mx.array:
    """Return kernel(*arguments) with the gradient of plain(*arguments), or plain(*arguments) without kernels.

    The result has the dtype of the first argument.
    """
    arrays = flatten(arguments)
    arrays32 = upcast(*arrays)
    if backend_of(*arrays32) is not kernels.native:
        return plain(*arguments)

    # MLX's custom functions take arrays only.
    def on_arrays(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
        return lambda *present: function(*unflatten(arguments, present))

    function: Any = mx.custom_function(on_arrays(kernel))
    function.vjp(lambda present, dy, _: mx.vjp(on_arrays(plain), list(present), [dy])[1])
    return function(*(x for x in arrays32 if x is not None)).astype(arrays[0].dtype)


def flatten(arguments: Sequence[mx.array | Affine | None]) -> list[Any]:
    """Return the arrays of the arguments, with None for those that are absent."""
    return [x for argument in arguments for x in (argument if isinstance(argument, tuple) else (argument,))]


def unflatten(arguments: Sequence[mx.array | Affine | None], present: Sequence[mx.array]) -> list[Any]:
    """Return arguments of the same structure that hold other arrays, given without the absent ones."""
    rest = iter(present)
    return [
        Affine(*(None if x is None else next(rest) for x in argument))  # type: ignore[arg-type]
        if isinstance(argument, tuple)
        else (None if argument is None else next(rest))
        for argument in arguments
    ]


def gated_linear(
    z: mx.array,
    norm: Affine,
    gate: Affine,
    layer: Affine,
    x: mx.array | None = None,
    x_norm: Affine | None = None,
    mask: mx.array | None = None,
    residual: mx.array | None = None,
    channels_first: bool = False,
) -> mx.array:
    """Return sigmoid(gate(z')) · layer(z') · mask + residual, with layer(x_norm(x)) instead of layer(z') if x is given.

    Args:
        z: [B, L, L, C].
        norm: the layer norm of z.
        gate: a linear layer.
        layer: a linear layer.
        x: [C, B, L, L].
        x_norm: the layer norm of x.
        mask: [B, L, L].
        residual: [B, L, L, outputs]; not with `channels_first`.
        channels_first: whether to return [outputs, B, L, L].

    Returns:
        [B, L, L, outputs], or [outputs, B, L, L] with `channels_first`.
    """

    def kernel(
        z: mx.array,
        norm: Affine,
        gate: Affine,
        layer: Affine,
        x: mx.array | None,
        x_norm: Affine | None,
        mask: mx.array | None,
        residual: mx.array | None,
    ) -> mx.array:
        x_norm_eps = None if x_norm is None else (*x_norm, EPS)
        return kernels.native.gated_linear(z, (*norm, EPS), gate, layer, x, x_norm_eps, mask, residual, channels_first)

    def plain(
        z: mx.array,
        norm: Affine,
        gate: Affine,
        layer: Affine,
        x: mx.array | None,
        x_norm: Affine | None,
        mask: mx.array | None,
        residual: mx.array | None,
    ) -> mx.array:
        def step(z: mx.array, x: mx.array | None, mask: mx.array | None, residual: mx.array | None) -> mx.array:
            z = layer_norm(z, *norm, EPS)
            x = z if x is None or x_norm is None else layer_norm(x, *x_norm, EPS)
            y = linear(x, *layer) * mx.sigmoid(linear(z, *gate))
            y = y if mask is None else y * mask[..., None]
            return y if residual is None else y + residual

        x = None if x is None else mx.moveaxis(x, 0, -1)
        y = by_rows(step, rows_at_a_time(z[:, :1].size), z, x, mask, residual)
        return mx.moveaxis(y, -1, 0) if channels_first else y

    return fused(kernel, plain, z, norm, gate, layer, x, None if x is None else x_norm, mask, residual)


def triangle_multiplication(
    z: mx.array,
    mask: mx.array,
    norm: Affine,
    left: tuple[Affine, Affine],
    right: tuple[Affine, Affine],
    x_norm: Affine,
    output: tuple[Affine, Affine],
    outgoing: bool,
    residual: mx.array | None = None,
) -> mx.array:
    """Return the update of each edge (i, j) from the edges of i and j to every third token k, plus the residual.

    The edges are a = sigmoid(gate(z')) · layer(z') · mask with the layers `left`, and b with the layers `right`. Their
    product x is Σ_k a_ik · b_jk for outgoing edges, and Σ_k a_ki · b_kj for incoming ones, in each channel. The update
    is sigmoid(gate(z')) · layer(x_norm(x)) with the layers `output`.

    Args:
        z: [B, L, L, C].
        mask: [B, L], 0 at padding.
        norm: the layer norm of z.
        left: gate and layer of a.
        right: gate and layer of b.
        x_norm: the layer norm of x.
        output: gate and layer of the update.
        outgoing: whether to multiply outgoing or incoming edges.
        residual: [B, L, L, outputs].

    Returns:
        [B, L, L, outputs].

    Source: Jumper et al. 2021 (doi:10.1038/s41586-021-03819-2), Supplement, Algorithms 11 and 12.
    """
    pairs = (mask[:, :, None] * mask[:, None, :]).astype(z.dtype)
    products = []
    size = -(-len(left[1].weight) // CHANNEL_GROUPS)
    for first in range(0, len(left[1].weight), size):
        channels = slice(first, first + size)
        edges = []
        for side in (left, right):
            gate, layer = (channels_of(layer, channels) for layer in side)
            edges.append(gated_linear(z, norm, gate, layer, mask=pairs, channels_first=True))
        a, b = edges
        products.append(a @ b.swapaxes(-1, -2) if outgoing else a.swapaxes(-1, -2) @ b)
        del a, b, edges
        evaluate(products[-1])
    x = mx.concatenate(products)
    del products
    evaluate(x)
    gate, layer = output
    return gated_linear(z, norm, gate, layer, x, x_norm, residual=residual)


def channels_of(layer: Affine, channels: slice) -> Affine:
    """Return a linear layer that computes only some of the output channels."""
    return Affine(layer.weight[channels], None if layer.bias is None else layer.bias[channels])


def triangle_attention(
    z: mx.array,
    mask: mx.array,
    norm: Affine,
    bias: mx.array,
    query: mx.array,
    key: mx.array,
    value: mx.array,
    gate: Affine,
    output: Affine,
    residual: mx.array | None = None,
    ending: bool = False,
    rows: int | None = None,
) -> mx.array:
    """Return output(sigmoid(gate(z')) · attention(z')) + residual, with attention inside each row of pairs.

    Args:
        z: [B, L, L, C].
        mask: [B, L], 0 for a residue that is hidden as a key.
        norm: the layer norm of z.
        bias: [H, C], from z' to the bias of each head. All rows share it: z'_jk gives that of query j and key k.
        query: weight [C, C].
        key: weight [C, C].
        value: weight [C, C].
        gate: a linear layer.
        output: a linear layer.
        residual: [B, L, L, C].
        ending: whether to attend inside columns instead of rows.
        rows: how many rows to compute at a time without kernels; by default as many as `ELEMENTS_AT_A_TIME` allows.

    Returns:
        [B, L, L, C].
    """

    def kernel(
        z: mx.array,
        mask: mx.array,
        norm: Affine,
        bias: mx.array,
        query: mx.array,
        key: mx.array,
        value: mx.array,
        gate: Affine,
        output: Affine,
        residual: mx.array | None,
    ) -> mx.array:
        return kernels.native.triangle_attention(
            z, mask, (*norm, EPS), bias, query, key, value, gate, output, residual, ending
        )

    def plain(
        z: mx.array,
        mask: mx.array,
        norm: Affine,
        bias: mx.array,
        query: mx.array,
        key: mx.array,
        value: mx.array,
        gate: Affine,
        output: Affine,
        residual: mx.array | None,
    ) -> mx.array:
        if ending:
            z, residual = z.swapaxes(1, 2), None if residual is None else residual.swapaxes(1, 2)
        head_biases = by_rows(lambda z: linear(layer_norm(z, *norm, EPS), bias), rows_at_a_time(z[:, :1].size), z)
        # Not −∞: in rows of nothing but padding that would become NaN, which spreads.
        hidden = 1e9 * (mask.astype(z.dtype) - 1)
        scores_bias = head_biases.transpose(0, 3, 1, 2) + hidden[:, None, None, :]
        attend = plain_backend().scaled_dot_product_attention

        def step(z: mx.array, residual: mx.array | None) -> mx.array:
            z = layer_norm(z, *norm, EPS)
            q, k, v = (mx.unflatten(linear(z, w), -1, (len(bias), -1)).swapaxes(2, 3) for w in (query, key, value))
            q = q * q.shape[-1] ** -0.5
            y = mx.stack([attend(q[b], k[b], v[b], None, scores_bias[b : b + 1]) for b in range(len(z))])
            y = y.swapaxes(2, 3).flatten(3) * mx.sigmoid(linear(z, *gate))
            return linear(y, *output, residual)

        y = by_rows(step, rows or rows_at_a_time(scores_bias.size), z, residual)
        return y.swapaxes(1, 2) if ending else y

    return fused(kernel, plain, z, mask, norm, bias, query, key, value, gate, output, residual)


def transition(
    x: mx.array,
    norm: Affine,
    expand: Affine,
    shrink: Affine,
    residual: mx.array | None = None,
    rows: int | None = None,
    gated: bool = False,
) -> mx.array:
    """Return shrink(ReLU(expand(x'))) + residual, where x' is the layer norm of x.

    Args:
        x: [B, L, ..., C].
        norm: the layer norm of x.
        expand: a linear layer.
        shrink: a linear layer.
        residual: [B, L, ..., C].
        rows: see `triangle_attention`.
        gated: whether the hidden state is SwiGLU, silu(first half) · second half of expand(x'), instead of ReLU.

    Returns:
        [B, L, ..., C].
    """

    def kernel(x: mx.array, norm: Affine, expand: Affine, shrink: Affine, residual: mx.array | None) -> mx.array:
        return kernels.native.transition(x, (*norm, EPS), expand, shrink, residual, gated)

    def plain(x: mx.array, norm: Affine, expand: Affine, shrink: Affine, residual: mx.array | None) -> mx.array:
        def step(x: mx.array, residual: mx.array | None) -> mx.array:
            hidden = linear(layer_norm(x, *norm, EPS), *expand, activation=None if gated else "relu")
            return linear(swiglu(*mx.split(hidden, 2, axis=-1)) if gated else hidden, *shrink, residual)

        elements = len(expand.weight) * x[:, :1, ..., 0].size
        return by_rows(step, rows or rows_at_a_time(elements), x, residual)

    return fused(kernel, plain, x, norm, expand, shrink, residual)
