"""Linux CPUs, where they could be built: the kernels of `native/`, fused and on all cores, in float32.

They are C++ on libmlx, whose binary interface belongs to one version of MLX: they are loaded into the version they were
built with and into no other. `MLX_ESM_KERNELS=0` leaves them out; the name of an instruction set (`avx2`, `portable`)
chooses it instead of the machine's best.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.ops.heads import Norms, Rotary
from mlx_esm_hf.ops.layout import Layout
from mlx_esm_hf.runtime.threads import thread_limits

# What setup.py leaves behind: {"mlx": the version of mlx-cpu it built with} or {"error": why it could not}.
BUILD = Path(__file__).with_name("_native.json")
CHOSEN_OFF = "off (MLX_ESM_KERNELS=0)"
AGAIN = (
    "install mlx-esm-hf again, by pip's --force-reinstall --no-cache-dir, on Linux with a C++ compiler (g++ 11 or "
    "newer) and Python's headers (Debian and Ubuntu: apt install g++ python3-dev)"
)


def _load() -> tuple[Any, str]:
    """The module with the kernels, or None; and what `mlx-esm env` says of them."""
    wish = os.environ.get("MLX_ESM_KERNELS", "")
    if wish == "0":
        return None, CHOSEN_OFF
    misfit = _misfit()
    if misfit:
        return None, f"off: {misfit}"
    try:
        module = importlib.import_module("mlx_esm_hf.ops._native")
        module.use_threads(min(thread_limits().values()))
        _try(module)
    except Exception as error:  # whatever a binary of another library does, MLX can go on without it
        return None, f"off: they do not work here ({type(error).__name__}: {error}); {AGAIN}"
    if wish not in ("", "1"):
        if wish not in module.instruction_sets():
            known = ", ".join(module.instruction_sets())
            raise UserError(f"MLX_ESM_KERNELS={wish}: this machine has {known}; 0 turns the kernels off.")
        module.choose(wish)
    return module, f"{module.instruction_set()}, threads: {module.threads()}"


def _misfit() -> str | None:
    """Why the module should not be loaded, and the cure; None where it should."""
    try:
        build = json.loads(BUILD.read_text())
        built_with = build.get("mlx")
    except (OSError, ValueError, AttributeError):
        return f"not built; {AGAIN}"
    if built_with is None:
        return f"not built ({build.get('error')})"
    try:
        installed = version("mlx-cpu")
    except PackageNotFoundError:
        installed = "none"
    if installed != built_with:
        return f'built with mlx-cpu {built_with}, installed is {installed}; pip install "mlx[cpu]=={built_with}"'
    return None


def _try(module: ModuleType) -> None:
    """Run one kernel, and raise where that fails.

    It runs on a stream of its own: a stream has a thread, and a process that forks before it has made a model must not
    have started the one of MLX's default stream, for which the child would wait.
    """
    with mx.stream(mx.new_stream(mx.cpu)):
        found = module.linear(mx.array([[1.0, 2.0]]), mx.array([[3.0, 4.0]])).item()
    if found != 11:
        raise ArithmeticError(f"1 · 3 + 2 · 4 is 11, not {found}")


@functools.cache
def warn_if_missing() -> None:
    """Say once why there are no kernels where there should be: on a Linux CPU, unless they were turned off."""
    if native is None and STATE != CHOSEN_OFF and sys.platform == "linux" and not mx.is_available(mx.gpu):
        warnings.warn(
            f"The kernels for CPUs are {STATE}. Without them models give the same answers several times more slowly; "
            "with MLX_ESM_KERNELS=0 this is not said.",
            RuntimeWarning,
            stacklevel=2,
        )


native, STATE = _load()


def linear(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    residual: mx.array | None,
    activation: str | None,
    output_scale: float,
) -> mx.array:
    """`ops.linear`."""
    return native.linear(x, weight, bias, residual, activation, output_scale)


BITS = (2, 3, 4, 6, 8)  # of a quantized weight


def half_linear(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    residual: mx.array | None,
    activation: str | None,
    output_scale: float,
) -> mx.array:
    """`ops.linear` of float32 with a weight of float16 or bfloat16."""
    return native.half_linear(x, weight, bias, residual, activation, output_scale)


def quantized_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    bias: mx.array | None,
    residual: mx.array | None,
    activation: str | None,
    output_scale: float,
    group_size: int,
    bits: int,
    integers: bool,
) -> mx.array:
    """`ops.quantized_linear` of float32."""
    return native.quantized_linear(
        x, weight, scales, biases, bias, residual, activation, output_scale, group_size, bits, integers
    )


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array | None, eps: float) -> mx.array:
    """`ops.layer_norm`."""
    return native.layer_norm(x, weight, bias, eps)


def gelu(x: mx.array) -> mx.array:
    """`ops.gelu`."""
    return native.gelu(x)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`ops.swiglu`."""
    return native.swiglu(gate, up)


def softmax(x: mx.array) -> mx.array:
    """`ops.softmax`."""
    return native.softmax(x)


def attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    heads: int,
    layout: Layout,
    rotary: Rotary | None,
    bias_kv: tuple[mx.array, mx.array] | None,
    bias: mx.array | None,
    norms: Norms | None,
) -> mx.array:
    """`ops.attention`, of a batch or of a packed one."""
    seen = None if layout.visible is None else layout.visible.flatten()
    cos, sin = (x.flatten(0, 1) for x in rotary) if rotary else (None, None)
    bias_k, bias_v = (x.flatten() for x in bias_kv) if bias_kv else (None, None)
    return native.attention(
        query, key, value, heads, layout.offsets, seen, cos, sin, bias_k, bias_v, bias, *(norms or ())
    )


def sum_of_squares(x: mx.array) -> mx.array:
    """`ops.sum_of_squares`."""
    return native.sum_of_squares(x)


def adamw(*arrays: mx.array, betas: tuple[float, float], epsilon: float, decay: float) -> list[mx.array]:
    """`ops.adamw`, of the same arrays."""
    return native.adamw(*arrays, *betas, epsilon, decay)


Affine = tuple[mx.array, mx.array | None]  # the weight and bias of a layer
Norm = tuple[mx.array, mx.array | None, float]  # the same of a layer norm, and its eps


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
) -> mx.array:
    """`pairs.gated_linear`."""
    return native.gated_linear(z, norm, gate, layer, x, x_norm, mask, residual, channels_first)


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
    residual: mx.array | None,
    ending: bool,
) -> mx.array:
    """`pairs.triangle_attention`."""
    return native.triangle_attention(z, mask, norm, bias, query, key, value, gate, output, residual, ending)


def transition(x: mx.array, norm: Norm, expand: Affine, shrink: Affine, residual: mx.array | None) -> mx.array:
    """`pairs.transition`."""
    return native.transition(x, norm, expand, shrink, residual)
