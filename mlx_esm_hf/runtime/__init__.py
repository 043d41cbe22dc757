"""What the process needs before it computes: a BLAS, and memory that is kept."""

from __future__ import annotations

import os

import mlx.core as mx

from mlx_esm_hf.runtime import blas, memory


def prepare() -> None:
    """Give MLX a fast BLAS where it lacks one and, where it computes on a CPU, let freed memory be kept.

    `MLX_ESM_BLAS=0` and `MLX_ESM_MALLOC=0` leave the process as it is.
    """
    blas.bind()
    if mx.default_device() == mx.cpu and os.environ.get("MLX_ESM_MALLOC") != "0":
        memory.keep_freed_memory()
