"""Loading the kernels of `native/`: fused float32 operations on all cores of a Linux CPU.

They are C++ on libmlx, whose binary interface is different in each version of MLX, so they are only loaded into the
version that they were built with. `MLX_ESM_KERNELS=0` turns them off. The name of an instruction set (`avx2`,
`portable`) selects it instead of the fastest that the machine has.
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
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runtime.threads import thread_limits

# Written by setup.py: {"mlx": version of mlx-cpu that the kernels were built with} or {"error": why the build failed}.
BUILD = Path(__file__).with_name("_native.json")
CHOSEN_OFF = "off (MLX_ESM_KERNELS=0)"
REINSTALL = (
    "install mlx-esm-hf again with pip's --force-reinstall --no-cache-dir, on Linux with a C++ compiler (g++ 11 or "
    "newer) and Python's headers (Debian and Ubuntu: apt install g++ python3-dev)"
)


def _load() -> tuple[Any, str]:
    """Return the module with the kernels, or None, and their state for `mlx-esm env`."""
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
    except Exception as error:  # an incompatible binary can fail in any way; without it MLX still works
        return None, f"off: they do not work here ({type(error).__name__}: {error}); {REINSTALL}"
    if wish not in ("", "1"):
        if wish not in module.instruction_sets():
            known = ", ".join(module.instruction_sets())
            raise UserError(f"MLX_ESM_KERNELS must be 0, 1 or one of {known} on this machine, got {wish}.")
        module.choose(wish)
    return module, f"{module.instruction_set()}, threads: {module.threads()}"


def _misfit() -> str | None:
    """Return why the module must not be loaded and what to do about it; None if it may be loaded."""
    try:
        build = json.loads(BUILD.read_text())
        built_with = build.get("mlx")
    except (OSError, ValueError, AttributeError):
        return f"not built; {REINSTALL}"
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
    """Run one kernel, and raise an exception if its result is wrong.

    It runs on a new stream. Every stream has a thread, and a process that forks before it makes a model must not have
    started the thread of MLX's default stream, since the child would wait for it.
    """
    with mx.stream(mx.new_stream(mx.cpu)):
        found = module.linear(mx.array([[1.0, 2.0]]), mx.array([[3.0, 4.0]])).item()
    if found != 11:
        raise ArithmeticError(f"1 · 3 + 2 · 4 is 11, not {found}")


@functools.cache
def warn_if_missing() -> None:
    """Warn once if there are no kernels on a Linux CPU, and say why. Do nothing if they were turned off."""
    if native is None and STATE != CHOSEN_OFF and sys.platform == "linux" and not mx.is_available(mx.gpu):
        warnings.warn(
            # Measured: 29 s of processor time with kernels, 143 s without; ESM-2 8M, the 100 proteins of examples/.
            f"The kernels for CPUs are {STATE}, so embedding takes about 5 times the processor time, with the same "
            "results (MLX_ESM_KERNELS=0 silences this warning).",
            RuntimeWarning,
            stacklevel=2,
        )


if TYPE_CHECKING:
    from mlx_esm_hf.ops import _native as native  # None at run time if the kernels are off

    STATE: str
else:
    native, STATE = _load()
