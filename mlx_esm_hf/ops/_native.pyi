"""Types of the compiled kernels. All arrays are float32 unless noted; see `dispatch` and `pairs` for their shapes."""

from collections.abc import Sequence

import mlx.core as mx

Affine = tuple[mx.array, mx.array | None]  # weight, bias
Norm = tuple[mx.array, mx.array | None, float]  # weight, bias, eps

def linear(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    residual: mx.array | None = None,
    activation: str | None = None,
    output_scale: float = 1.0,
) -> mx.array: ...
def half_linear(
    x: mx.array,
    weight: mx.array,  # float16 or bfloat16
    bias: mx.array | None = None,
    residual: mx.array | None = None,
    activation: str | None = None,
    output_scale: float = 1.0,
) -> mx.array: ...
def quantized_linear(
    x: mx.array,
    weight: mx.array,  # uint32
    scales: mx.array,  # float32, float16 or bfloat16
    biases: mx.array,
    bias: mx.array | None,
    residual: mx.array | None,
    activation: str | None,
    output_scale: float,
    group_size: int,
    bits: int,
    integers: bool = False,
) -> mx.array: ...
def gelu(x: mx.array) -> mx.array: ...
def swiglu(gate: mx.array, up: mx.array) -> mx.array: ...
def sigmoid_gate(x: mx.array | None, gate: mx.array) -> mx.array: ...
def softmax(x: mx.array) -> mx.array: ...
def layer_norm(x: mx.array, weight: mx.array, bias: mx.array | None, eps: float) -> mx.array: ...
def sum_of_squares(x: mx.array) -> mx.array: ...
def adamw(
    weight: mx.array,
    gradient: mx.array,
    mean: mx.array,
    square: mx.array,
    scale: mx.array,
    learning_rate: mx.array,
    step: mx.array,  # uint64
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: float,
) -> list[mx.array]: ...
def attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    heads: int,
    offsets: list[int],
    mask: mx.array | None = None,  # bool [tokens]
    cos: mx.array | None = None,
    sin: mx.array | None = None,
    bias_k: mx.array | None = None,
    bias_v: mx.array | None = None,
    bias: mx.array | None = None,
    query_norm: mx.array | None = None,
    key_norm: mx.array | None = None,
    eps: float = 1e-5,
) -> mx.array: ...
def windowed_attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    heads: int,
    offsets: list[int],
    window: int,
    mask: mx.array | None = None,  # bool [tokens]
) -> mx.array: ...
def gated_linear(
    z: mx.array,
    norm: Norm,
    gate: Affine,
    layer: Affine,
    x: mx.array | None,
    x_norm: Norm | None,
    mask: mx.array | None,
    residual: mx.array | None,
    channels_first: bool,
    /,
) -> mx.array: ...
def triangle_attention(
    z: mx.array,
    mask: mx.array,
    norm: Norm,
    bias: mx.array,
    query: mx.array,
    key: mx.array,
    value: mx.array,
    gate: Affine,
    output: Affine,
    residual: mx.array | None = None,
    ending: bool = False,
) -> mx.array: ...
def transition(
    x: mx.array,
    norm: Norm,
    expand: Affine,
    shrink: Affine,
    residual: mx.array | None = None,
    gated: bool = False,
) -> mx.array: ...
def mapped(path: str, offset: int, shape: Sequence[int], dtype: mx.Dtype) -> mx.array: ...
def multiply_adds(operations: float) -> float: ...
def use_threads(n: int) -> None: ...
def threads() -> int: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def choose(name: str) -> None: ...
