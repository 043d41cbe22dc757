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
from mlx_esm_hf.ops.packing import Packing

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


def attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    heads: int,
    mask: mx.array | Packing | None = None,
    rotary: Rotary | None = None,
    bias_kv: tuple[mx.array, mx.array] | None = None,
) -> mx.array:
    B, L, _ = query.shape
    if isinstance(mask, Packing):
        offsets, seen = mask.offsets, None
    else:
        offsets = list(range(0, B * L + 1, L))
        seen = None if mask is None else mx.broadcast_to(mask[:, 0, 0], (B, L)).flatten()
    cos, sin = (x.flatten(0, 1) for x in rotary) if rotary else (None, None)
    bias_k, bias_v = (x.flatten() for x in bias_kv) if bias_kv else (None, None)
    return native.attention(query, key, value, heads, offsets, seen, cos, sin, bias_k, bias_v)
