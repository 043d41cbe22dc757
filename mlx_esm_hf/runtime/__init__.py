"""What the process needs before it computes: a BLAS, and memory that is kept."""

from __future__ import annotations

import os

import mlx.core as mx

from mlx_esm_hf.runtime import blas, memory
from mlx_esm_hf.runtime.threads import thread_limits


def prepare() -> None:
    """Give MLX a fast BLAS where it lacks one and, where it computes on a CPU, let freed memory be kept.

    `MLX_ESM_BLAS=0` and `MLX_ESM_MALLOC=0` leave the process as it is.
    """
    limits = thread_limits()
    if "cgroup quota" in limits and os.environ.get("MLX_ESM_BLAS") != "0":  # the one limit that OpenBLAS does not know
        os.environ.setdefault("OPENBLAS_NUM_THREADS", str(min(limits.values())))
    blas.bind()
    if mx.default_device() == mx.cpu and os.environ.get("MLX_ESM_MALLOC") != "0":
        memory.keep_freed_memory()
