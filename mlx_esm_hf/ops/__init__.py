"""Operations on arrays that have a best way on each device; which one is taken is decided here and nowhere else.

`kernels` are our own, for float32 on Linux CPUs where they could be built; `cpu` has compositions of MLX's operations,
`gpu` MLX's fused ones.
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

__all__ = [
    "Layout",
    "activated",
    "adamw",
    "attention",
    "attention_probabilities",
    "choose_layout",
    "compiled",
    "computing_dtype",
    "gelu",
    "layer_norm",
    "linear",
    "merge_heads",
    "packs",
    "quantized_linear",
    "softmax",
    "split_heads",
    "sum_of_squares",
    "swiglu",
]


ACTIVATIONS = (None, "gelu", "relu")
HALF = (mx.float16, mx.bfloat16)


def plain_backend() -> ModuleType:
    """The one of MLX's own operations on the default device."""
    return cpu if mx.default_device() == mx.cpu else gpu


def backend_of(*arrays: mx.array | None) -> ModuleType:
    """The best one on the default device for arrays of these dtypes."""
    on_cpu = mx.default_device() == mx.cpu
    if not on_cpu or kernels.native is None or any(x is not None and x.dtype != mx.float32 for x in arrays):
        return plain_backend()
    return kernels


def computing_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """In which the states of a network of this dtype are computed: on a CPU in float32, as half precision is slow there
    and saves memory where it matters, in the weights."""
    return mx.float32 if dtype in HALF and backend_of() is not gpu else dtype


def upcast(*arrays: mx.array | None) -> list[Any]:
    """The arrays for our kernels, which compute in float32: those of half precision become it. Where there are no
    kernels they stay as they are."""
    dtypes = {array.dtype for array in arrays if array is not None}
    if not dtypes & set(HALF) or not dtypes <= {*HALF, mx.float32} or backend_of() is not kernels:
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
    """x · weightᵀ + bias, then the activation, then · output_scale, then + residual.

    Args:
        x: [..., inputs].
        weight: [outputs, inputs]. Kernels read it in half precision, too, without a copy in float32.
        bias: [outputs].
        residual: [..., outputs].
        activation: "gelu" or "relu".
    """
    if activation not in ACTIVATIONS:
        raise UserError(f"activation={activation!r} is neither 'gelu' nor 'relu'.")
    if weight.dtype in HALF and backend_of() is kernels:
        x32, bias32, residual32 = upcast(x, bias, residual)
        if backend_of(x32, bias32, residual32) is kernels:
            return kernels.half_linear(x32, weight, bias32, residual32, activation, output_scale).astype(x.dtype)
    if backend_of(x, weight, bias, residual) is kernels:
        return kernels.linear(x, weight, bias, residual, activation, output_scale)
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
    """`linear` with a weight that `mx.quantize` has made: [outputs, inputs · bits / 32], beside its scales and biases.

    On a CPU MLX's own product of a quantized matrix is 50 times slower than one of the matrix that it stands for.

    Args:
        activation_dtype: "int8" rounds x to 8 bits, with a scale for each token and group, and kernels multiply
            integers; gradients are those of a layer that does not round.
    """
    if mode == "affine" and bits in kernels.BITS:
        x32, bias32, residual32 = upcast(x, bias, residual)
        if biases is not None and backend_of(x32, bias32, residual32) is kernels:
            integers = activation_dtype == "int8"
            y = kernels.quantized_linear(
                x32, weight, scales, biases, bias32, residual32, activation, output_scale, group_size, bits, integers
            )
            return y.astype(x.dtype)
    if activation_dtype == "int8":
        x = rounded(x, group_size)
    backend = backend_of(x)
    if backend is not gpu:
        if mode == "affine" and x.dtype == mx.float32:  # so that the weight is not rounded to the scales' precision
            scales, biases = scales.astype(x.dtype), None if biases is None else biases.astype(x.dtype)
        whole = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
        return linear(x, whole.astype(x.dtype), bias, residual, activation, output_scale)
    y = mx.quantized_matmul(x, weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
    return activated(y if bias is None else y + bias, residual, activation, output_scale)


def rounded(x: mx.array, group_size: int) -> mx.array:
    """x [..., inputs] with each group of a token rounded to multiples of a 127th of its largest number, as int8 has
    them; its gradient is that of x."""
    groups = mx.unflatten(x.astype(mx.float32), -1, (-1, group_size))
    largest = mx.abs(groups).max(-1, keepdims=True)
    to_integer = mx.where(largest > 1e-30, 127 / mx.maximum(largest, 1e-30), 0)
    found = (mx.round(groups * to_integer) * (largest / 127)).flatten(-2).astype(x.dtype)
    return x + mx.stop_gradient(found - x)


def activated(y: mx.array, residual: mx.array | None, activation: str | None, output_scale: float = 1.0) -> mx.array:
    """The activation of y, then · output_scale, then + residual: what `linear` does behind its product."""
    if activation == "gelu":
        y = gelu(y)
    elif activation == "relu":
        y = mx.maximum(y, 0)
    if output_scale != 1:
        y = y * output_scale
    return y if residual is None else y + residual


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array | None, eps: float) -> mx.array:
    """Layer norm over the last axis (Ba et al. 2016), `eps` inside the root; it need not have a bias."""
    x32, weight32, bias32 = upcast(x, weight, bias)
    return backend_of(x32, weight32, bias32).layer_norm(x32, weight32, bias32, eps).astype(x.dtype)


def gelu(x: mx.array) -> mx.array:
    """x · Φ(x) by the exact error function, as ESM has it (not the tanh approximation)."""
    (x32,) = upcast(x)
    return backend_of(x32).gelu(x32).astype(x.dtype)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) · up, where silu(x) = x / (1 + e^−x) (Shazeer 2020)."""
    gate32, up32 = upcast(gate, up)
    return backend_of(gate32, up32).swiglu(gate32, up32).astype(gate.dtype)


def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis, summed in float32 or better; the result has the dtype of `x`."""
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
    """Multi-head attention, softmax(rotate(query / √d) · rotate(key)ᵀ + bias) · value in each head.

    Args:
        query, key, value: [B, L, D], d = D / heads; [1, T, D] of a packed batch.
        layout: which tokens see which; None, all of a row.
        rotary: cosines and sines of the angles of each position, [B, L, d / 2].
        bias_kv: a key and a value, D numbers each, that every sequence has besides its own (ESM-1).
        bias: [B or 1, heads, L, L], added to the scores; for a batch that is not packed, without `bias_kv`.
        norms: query and key are normalised first, over all heads: the weights of the two layer norms, which have no
            bias, D numbers each, and their eps.

    Returns:
        [B, L, D].
    """
    layout = layout or Layout(query.shape[:2])  # type: ignore[arg-type]
    dtype, eps = query.dtype, norms[2] if norms else 0.0
    more = *(rotary or (None, None)), *(bias_kv or (None, None)), bias, *(norms or (None, None))[:2]
    arrays = upcast(query, key, value, *more)
    query, key, value, cos, sin, bias_k, bias_v, bias, of_query, of_key = arrays
    rotary, bias_kv = rotary and (cos, sin), bias_kv and (bias_k, bias_v)
    # Chains in rows that are not packed are seen by a mask of pairs, which the kernels do not take.
    by_pairs = layout.visible is not None and layout.visible.ndim == 3
    backend = plain_backend() if by_pairs else backend_of(*arrays)
    if backend is kernels:
        norms = norms and (of_query, of_key, eps)
        return kernels.attention(query, key, value, heads, layout, rotary, bias_kv, bias, norms).astype(dtype)
    assert not layout.packed, "`choose_layout` packs for the kernels alone"
    if norms:
        query, key = layer_norm(query, of_query, None, eps), layer_norm(key, of_key, None, eps)
    split = split_heads(query, key, value, heads, layout, rotary, bias_kv)
    return merge_heads(backend.scaled_dot_product_attention(*split, bias)).astype(dtype)


def attention_probabilities(query: mx.array, key: mx.array, mask: mx.array | None) -> mx.array:
    """The probabilities of attention, from what `split_heads` returns: [B, H, L, S]."""
    scores = query @ key.swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return softmax(scores)


def sum_of_squares(x: mx.array) -> mx.array:
    """Over all elements, in float32 or better."""
    if backend_of(x) is kernels:
        return kernels.sum_of_squares(x)
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
    """A step of AdamW (Loshchilov and Hutter 2019, algorithm 2) on one parameter, with Adam's correction of the bias.

    Args:
        weight, gradient, mean, square: of one shape; the last two are the running means of the gradient and its square.
        scale: by which the gradient is multiplied first.
        learning_rate, step: single numbers; the first step is 1, of uint64.
        decay: how strongly the weight shrinks, besides.

    Returns:
        The new weight, mean and square.
    """
    if backend_of(weight, gradient, mean, square) is kernels:
        arrays = weight, gradient, mean, square, scale, learning_rate, step
        return kernels.adamw(*arrays, betas=betas, epsilon=epsilon, decay=decay)
    gradient = gradient * scale
    mean = betas[0] * mean + (1 - betas[0]) * gradient
    square = betas[1] * square + (1 - betas[1]) * mx.square(gradient)
    corrected = mx.sqrt(square) * mx.rsqrt(1 - betas[1] ** step)
    moved = learning_rate / (1 - betas[0] ** step) * mean / (corrected + epsilon)
    return [weight * (1 - learning_rate * decay) - moved, mean, square]


def compiled(function: Callable[..., Any], state: Any) -> Callable[..., Any]:
    """A step of a training, compiled where that is faster: on a GPU.

    On a CPU the kernels are fused already, and a batch is packed by the values of its mask, which a compiled function
    does not see.

    Args:
        function: reads and changes `state`, besides its arguments.
    """
    if mx.default_device() == mx.cpu:
        return function
    return mx.compile(function, inputs=state, outputs=state)


def packs(dtype: mx.Dtype) -> bool:
    """Whether padded batches of a network of this dtype are packed, where nobody asks for what becomes of padding."""
    return computing_dtype(dtype) == mx.float32 and backend_of() is kernels


def choose_layout(
    shape: tuple[int, int],
    mask: mx.array | None,
    values: np.ndarray | None,
    dtype: mx.Dtype,
    keep_padding: bool = False,
    chains: mx.array | None = None,
) -> Layout:
    """How to compute a batch of a network in `dtype`: packed where that is faster, with our kernels, else as it is.

    Args:
        shape: (B, L).
        mask: [B, L], 0 at padding; None, there is none.
        values: those of the mask, where they are known (not under `mx.compile`).
        keep_padding: somebody asks for what becomes of padding.
        chains: [B, L], whole numbers, where a row holds several sequences; below 0 where the mask is 0.
    """
    mask = None if mask is None else mask.astype(mx.bool_)
    if mask is None or values is None or keep_padding or not packs(dtype):
        return Layout(shape, mask, chains=chains)
    return Layout(shape, packed=values.astype(bool), chains=chains)
