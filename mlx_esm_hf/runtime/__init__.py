"""What the process needs before it computes: a BLAS, and memory that is kept."""

from __future__ import annotations

import mlx.core as mx

from mlx_esm_hf.runtime import blas, memory


def prepare() -> None:
    """Give MLX a fast BLAS where it lacks one and, where it computes on a CPU, let freed memory be kept."""
    blas.bind()
    if mx.default_device() == mx.cpu:
        memory.keep_freed_memory()
