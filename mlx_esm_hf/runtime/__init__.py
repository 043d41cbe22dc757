"""Process-level concerns: BLAS, memory, threads, ranks, atomic files and batch costs per device."""

from __future__ import annotations

import os

import mlx.core as mx

from mlx_esm_hf.runtime import blas, memory
from mlx_esm_hf.runtime.threads import thread_limits


def prepare() -> None:
    """Replace the slow reference BLAS of MLX's CPU package and, on a CPU, keep freed memory for reuse.

    `MLX_ESM_BLAS=0` turns off the first, `MLX_ESM_MALLOC=0` the second.
    """
    limits = thread_limits()
    if "cgroup quota" in limits and os.environ.get("MLX_ESM_BLAS") != "0":  # OpenBLAS ignores this limit
        os.environ.setdefault("OPENBLAS_NUM_THREADS", str(min(limits.values())))
    blas.bind()
    if mx.default_device() == mx.cpu and os.environ.get("MLX_ESM_MALLOC") != "0":
        memory.keep_freed_memory()
