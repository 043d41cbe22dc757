"""Array operations, each computed by the fastest backend for the device and the dtype.

There are three backends: our own kernels (float32 on Linux CPUs, if they could be built), `cpu` (compositions of MLX
operations) and `gpu` (MLX's fused operations). This is the only place that chooses between them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.ops import cpu, gpu, kernels
from mlx_esm_hf.ops.heads import Norms, Rotary, merge_heads, split_heads
from mlx_esm_hf.ops.layout import Layout

ACTIVATIONS = (None, "gelu", "relu")
KERNEL_BITS = (2, 3, 4, 6, 8)  # of quantized weights that the kernels read
HALF = (mx.float16, mx.bfloat16)


def plain_backend() -> ModuleType:
    """Return the backend of the default device that is made of MLX's own operations."""
    return cpu if mx.default_device() == mx.cpu else gpu


def backend_of(*arrays: mx.array | None) -> ModuleType:
    """Return the fastest backend of the default device for arrays of these dtypes."""
    on_cpu = mx.default_device() == mx.cpu
    if not on_cpu or kernels.native is None or any(x is not None and x.dtype != mx.float32 for x in arrays):
        return plain_backend()
    return kernels.native


def computing_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """Return the dtype of the hidden states in a network whose weights have `dtype`.

    On a CPU, half-precision models compute in float32, which is faster. Only the weights stay small.
    """
    return mx.float32 if dtype in HALF and backend_of() is not gpu else dtype


def upcast(*arrays: mx.array | None) -> list[Any]:
    """Cast arrays in half precision to float32 for our kernels. Without kernels, return the arrays unchanged."""
    dtypes = {array.dtype for array in arrays if array is not None}
    if not dtypes & set(HALF) or not dtypes <= {*HALF, mx.float32} or backend_of() is not kernels.native:
        return list(arrays)
    return [None if array is None else array.astype(mx.float32) for array in arrays]


def linear(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    residual: mx.array | None = None,
    activation: str | None = None,
    output_scale: float = 1.0,
) -> mx.array:
    """Return activation(x · weightᵀ + bias) · output_scale + residual.

    Args:
        x: [..., inputs].
        weight: [outputs, inputs]. The kernels read a weight in half precision directly, without a float32 copy.
        bias: [outputs].
        residual: [..., outputs].
        activation: "gelu", "relu" or None.
        output_scale: factor of the output before the residual is added.

    Returns:
        [..., outputs].

    Raises:
        ValueError: another activation.
    """
    if activation not in ACTIVATIONS:
        raise UserError(f"activation must be 'gelu', 'relu' or None, got {activation!r}.")
    if weight.dtype in HALF and backend_of() is kernels.native:
        x32, bias32, residual32 = upcast(x, bias, residual)
        if backend_of(x32, bias32, residual32) is kernels.native:
            y = kernels.native.half_linear(x32, weight, bias32, residual32, activation, output_scale)
            return y.astype(x.dtype)
    if backend_of(x, weight, bias, residual) is kernels.native:
        return kernels.native.linear(x, weight, bias, residual, activation, output_scale)
    y = x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
    return activated(y, residual, activation, output_scale)


def quantized_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    bias: mx.array | None = None,
    residual: mx.array | None = None,
    activation: str | None = None,
    output_scale: float = 1.0,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
    activation_dtype: str | None = None,
) -> mx.array:
    """Return what `linear` does, for a weight that `mx.quantize` made.

    On a CPU, MLX's own quantized product is 50 times slower than a product with the dequantized matrix.

    Args:
        x: [..., inputs].
        weight: uint32 [outputs, inputs · bits / 32].
        scales: [outputs, inputs / group_size].
        biases: [outputs, inputs / group_size], or None in a mode that has none.
        bias: [outputs].
        residual: [..., outputs].
        activation: see `linear`.
        output_scale: see `linear`.
        group_size: as in `mx.quantize`.
        bits: as in `mx.quantize`.
        mode: as in `mx.quantize`.
        activation_dtype: "int8" rounds x to 8 bits, with one scale per token and group, and the kernels multiply
            integers. Gradients are those of a layer that does not round.

    Returns:
        [..., outputs].
    """
    if mode == "affine" and bits in KERNEL_BITS:
        x32, bias32, residual32 = upcast(x, bias, residual)
        if biases is not None and backend_of(x32, bias32, residual32) is kernels.native:
            integers = activation_dtype == "int8"
            y = kernels.native.quantized_linear(
                x32, weight, scales, biases, bias32, residual32, activation, output_scale, group_size, bits, integers
            )
            return y.astype(x.dtype)
    if activation_dtype == "int8":
        x = rounded(x, group_size)
    backend = backend_of(x)
    if backend is not gpu:
        if mode == "affine" and x.dtype == mx.float32:  # or the weight would be rounded to the dtype of the scales
            scales, biases = scales.astype(x.dtype), None if biases is None else biases.astype(x.dtype)
        dequantized = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
        return linear(x, dequantized.astype(x.dtype), bias, residual, activation, output_scale)
    y = mx.quantized_matmul(x, weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
    return activated(y if bias is None else y + bias, residual, activation, output_scale)


def rounded(x: mx.array, group_size: int) -> mx.array:
    """Return x [..., inputs] rounded to int8 values, with one scale per group: its largest absolute value / 127.

    The gradient is that of x.
    """
    groups = mx.unflatten(x.astype(mx.float32), -1, (-1, group_size))
    largest = mx.abs(groups).max(-1, keepdims=True)
    to_integer = mx.where(largest > 1e-30, 127 / mx.maximum(largest, 1e-30), 0)
    y = (mx.round(groups * to_integer) * (largest / 127)).flatten(-2).astype(x.dtype)
    return x + mx.stop_gradient(y - x)


def activated(y: mx.array, residual: mx.array | None, activation: str | None, output_scale: float = 1.0) -> mx.array:
    """Return activation(y) · output_scale + residual: what `linear` does after its product."""
    if activation == "gelu":
        y = gelu(y)
    elif activation == "relu":
        y = mx.maximum(y, 0)
    if output_scale != 1:
        y = y * output_scale
    return y if residual is None else y + residual


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array | None, eps: float) -> mx.array:
    """Normalize over the last axis (Ba et al. 2016).

    Args:
        x: [..., features].
        weight: [features].
        bias: [features], or None.
        eps: added to the variance.
    """
    x32, weight32, bias32 = upcast(x, weight, bias)
    return backend_of(x32, weight32, bias32).layer_norm(x32, weight32, bias32, eps).astype(x.dtype)


def gelu(x: mx.array) -> mx.array:
    """Return x · Φ(x) by the exact error function, which ESM uses, not by the tanh approximation."""
    (x32,) = upcast(x)
    return backend_of(x32).gelu(x32).astype(x.dtype)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) · up, where silu(x) = x / (1 + e^−x) (Shazeer 2020)."""
    gate32, up32 = upcast(gate, up)
    return backend_of(gate32, up32).swiglu(gate32, up32).astype(gate.dtype)


def sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + e^−x)."""
    (x32,) = upcast(x)
    return (kernels.native.sigmoid_gate(None, x32) if on_kernels(x32) else mx.sigmoid(x32)).astype(x.dtype)


def sigmoid_gate(x: mx.array, gate: mx.array) -> mx.array:
    """Return x · sigmoid(gate), for arrays of the same shape."""
    x32, gate32 = upcast(x, gate)
    if on_kernels(x32, gate32):
        return kernels.native.sigmoid_gate(x32, gate32).astype(x.dtype)
    return (x32 * mx.sigmoid(gate32)).astype(x.dtype)


def on_kernels(*arrays: mx.array) -> bool:
    """Return whether our kernels compute with these arrays."""
    return backend_of(*arrays) is kernels.native


def softmax(x: mx.array) -> mx.array:
    """Return the softmax over the last axis, summed at least in float32, in the dtype of `x`."""
    return backend_of(x).softmax(x)


def attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    heads: int,
    layout: Layout | None = None,
    rotary: Rotary | None = None,
    bias_kv: tuple[mx.array, mx.array] | None = None,
    bias: mx.array | None = None,
    norms: Norms | None = None,
) -> mx.array:
    """Return multi-head attention: softmax(rotate(query / √d) · rotate(key)ᵀ + bias) · value in each head.

    Args:
        query: [B, L, D], or [1, T, D] of a packed batch; d = D / heads.
        key: of the shape of `query`.
        value: of the shape of `query`.
        heads: number of heads.
        layout: which tokens see each other; by default all tokens of a row.
        rotary: cosines and sines of the angles of each position, each [B, L, d / 2].
        bias_kv: a learned key and value, each [D], that every sequence sees in addition to its own (ESM-1).
        bias: [B or 1, heads, L, L], added to the scores. Only for a batch that is not packed and without `bias_kv`.
        norms: layer norms of query and key over all heads, without bias: their weights, each [D], and eps.

    Returns:
        [B, L, D].
    """
    layout = layout or Layout(query.shape[:2])  # type: ignore[arg-type]
    dtype = query.dtype
    cos, sin = rotary or (None, None)
    bias_k, bias_v = bias_kv or (None, None)
    query_norm, key_norm, eps = norms or (None, None, 0.0)
    arrays = upcast(query, key, value, cos, sin, bias_k, bias_v, bias, query_norm, key_norm)
    query, key, value, cos, sin, bias_k, bias_v, bias, query_norm, key_norm = arrays

    # A mask of pairs, which separates the chains of rows that are not packed, is not supported by the kernels.
    has_pair_mask = layout.visible is not None and layout.visible.ndim == 3
    backend = plain_backend() if has_pair_mask else backend_of(*arrays)
    if backend is kernels.native:
        visible = None if layout.visible is None else layout.visible.flatten()
        cos, sin = (None if x is None else x.flatten(0, 1) for x in (cos, sin))
        bias_k, bias_v = (None if x is None else x.flatten() for x in (bias_k, bias_v))
        optional = visible, cos, sin, bias_k, bias_v, bias, query_norm, key_norm
        return kernels.native.attention(query, key, value, heads, layout.offsets, *optional, eps).astype(dtype)

    assert not layout.packed, "`choose_layout` packs only for the kernels"
    if norms:
        query, key = layer_norm(query, query_norm, None, eps), layer_norm(key, key_norm, None, eps)
    split = split_heads(query, key, value, heads, layout, rotary and (cos, sin), bias_kv and (bias_k, bias_v))
    return merge_heads(backend.scaled_dot_product_attention(*split, bias)).astype(dtype)


def attention_probabilities(query: mx.array, key: mx.array, mask: mx.array | None) -> mx.array:
    """Return attention probabilities [B, H, L, S] of a query and key from `split_heads`."""
    scores = query @ key.swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return softmax(scores)


def sum_of_squares(x: mx.array) -> mx.array:
    """Return the sum of the squares of all elements, accumulated at least in float32."""
    if backend_of(x) is kernels.native:
        return kernels.native.sum_of_squares(x)
    flat = x.flatten().astype(mx.float32)
    return flat @ flat


def adamw(
    weight: mx.array,
    gradient: mx.array,
    mean: mx.array,
    square: mx.array,
    scale: mx.array,
    learning_rate: mx.array,
    step: mx.array,
    betas: tuple[float, float],
    epsilon: float,
    decay: float,
) -> list[mx.array]:
    """Take a step of AdamW on one parameter, with Adam's bias correction.

    Args:
        weight: the parameter.
        gradient: of the same shape.
        mean: running mean of the gradient.
        square: running mean of its square.
        scale: scalar factor of the gradient.
        learning_rate: scalar.
        step: uint64 scalar; the first step is 1.
        betas: decay rates of `mean` and `square`.
        epsilon: added to the denominator.
        decay: weight decay.

    Returns:
        The new weight, mean and square.

    Source: Loshchilov and Hutter (2019), algorithm 2.
    """
    if backend_of(weight, gradient, mean, square) is kernels.native:
        arrays = weight, gradient, mean, square, scale, learning_rate, step
        return kernels.native.adamw(*arrays, *betas, epsilon, decay)
    gradient = gradient * scale
    mean = betas[0] * mean + (1 - betas[0]) * gradient
    square = betas[1] * square + (1 - betas[1]) * mx.square(gradient)
    corrected = mx.sqrt(square) * mx.rsqrt(1 - betas[1] ** step)
    moved = learning_rate / (1 - betas[0] ** step) * mean / (corrected + epsilon)
    return [weight * (1 - learning_rate * decay) - moved, mean, square]


def compiled(function: Callable[..., Any], state: Any) -> Callable[..., Any]:
    """Return a training step, compiled on a GPU and unchanged on a CPU.

    On a CPU the kernels are already fused, and batches are packed by the values of their mask, which a compiled
    function cannot see.

    Args:
        function: the step. It may read and change `state` in addition to its arguments.
        state: a tree of arrays.
    """
    if mx.default_device() == mx.cpu:
        return function
    return mx.compile(function, inputs=state, outputs=state)


def packs(dtype: mx.Dtype) -> bool:
    """Return whether padded batches of a network of this dtype are packed, if no outputs at padding are needed."""
    return computing_dtype(dtype) == mx.float32 and backend_of() is kernels.native


def choose_layout(
    shape: tuple[int, int],
    mask: mx.array | None,
    values: np.ndarray | None,
    dtype: mx.Dtype,
    keep_padding: bool = False,
    chains: mx.array | None = None,
    show_padding: bool = False,
) -> Layout:
    """Return how to compute a batch: packed with our kernels, which is faster, and unchanged without them.

    Args:
        shape: (B, L).
        mask: [B, L], 0 at padding; None if there is no padding.
        values: the values of the mask, if they are known. They are not under `mx.compile`.
        dtype: dtype of the network's weights.
        keep_padding: whether the caller needs intermediates at padding.
        chains: integers [B, L] that number the sequences of each row; negative where the mask is 0.
        show_padding: compute outputs at padding, and do not replace them by 0.
    """
    mask = None if mask is None else mask.astype(mx.bool_)
    if mask is None or values is None or keep_padding or show_padding or not packs(dtype):
        return Layout(shape, mask, chains=chains, show_padding=show_padding)
    return Layout(shape, packed=values.astype(bool), chains=chains)
