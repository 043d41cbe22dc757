"""Linux CPUs, where they could be built: the kernels of `native/`, fused and on all cores, in float32.

They are C++ on libmlx, whose binary interface belongs to one version of MLX: they are loaded into the version they were
built with and into no other. `MLX_ESM_KERNELS=0` leaves them out; the name of an instruction set (`avx2`, `portable`)
chooses it instead of the machine's best.
"""

from __future__ import annotations

import importlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlx_esm_hf.ops.heads import Rotary
from mlx_esm_hf.ops.layout import Layout

# What setup.py leaves behind: {"mlx": the version of mlx-cpu it built with} or {"error": why it could not}.
BUILD = Path(__file__).with_name("_native.json")


def _load() -> tuple[Any, str]:
    """The module with the kernels, or None; and what `mlx-esm env` says of them."""
    wish = os.environ.get("MLX_ESM_KERNELS", "")
    if wish == "0":
        return None, "off (MLX_ESM_KERNELS=0)"
    try:
        build = json.loads(BUILD.read_text())
        built_with = build.get("mlx")
    except (OSError, ValueError, AttributeError):
        return None, "off: not built (they are for Linux, and need a C++ compiler when this package is installed)"
    if built_with is None:
        return None, f"off: not built ({build.get('error')})"
    try:
        installed = version("mlx-cpu")
    except PackageNotFoundError:
        installed = "none"
    if installed != built_with:
        return None, f"off: built with mlx-cpu {built_with}, installed is {installed}; install mlx-esm-hf again"
    try:
        module: ModuleType = importlib.import_module("mlx_esm_hf.ops._native")
    except ImportError as error:
        return None, f"off: they cannot be loaded ({error})"
    if wish not in ("", "1"):
        if wish not in module.instruction_sets():
            known = ", ".join(module.instruction_sets())
            raise ValueError(f"MLX_ESM_KERNELS={wish}: this machine has {known}; 0 turns the kernels off.")
        module.choose(wish)
    return module, f"{module.instruction_set()}, {module.cores()} cores"


native, STATE = _load()


def linear(
    x: mx.array, weight: mx.array, bias: mx.array | None, residual: mx.array | None, activation: str | None
) -> mx.array:
    return native.linear(x, weight, bias, residual, activation)


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array | None, eps: float) -> mx.array:
    return native.layer_norm(x, weight, bias, eps)


def gelu(x: mx.array) -> mx.array:
    return native.gelu(x)


def softmax(x: mx.array) -> mx.array:
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
) -> mx.array:
    seen = None if layout.visible is None else layout.visible.flatten()
    cos, sin = (x.flatten(0, 1) for x in rotary) if rotary else (None, None)
    bias_k, bias_v = (x.flatten() for x in bias_kv) if bias_kv else (None, None)
    return native.attention(query, key, value, heads, layout.offsets, seen, cos, sin, bias_k, bias_v, bias)
