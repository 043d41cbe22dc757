"""Memory-mapped arrays: the system reads their pages from the file on first use and may drop them again.

The file must not change while such an array exists. To replace it, write a new file and rename it over the old one, as
`save_pretrained` does.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Sequence

import mlx.core as mx

from mlx_esm_hf.ops import kernels

# Smaller arrays are read: a mapping costs system calls and up to two extra pages of memory.
MIN_MAPPED_BYTES = 1 << 18


def mapped(path: str | os.PathLike[str], offset: int, shape: Sequence[int], dtype: mx.Dtype) -> mx.array | None:
    """Return an array that is mapped from a file, or None if it has to be read.

    It has to be read without our kernels, on a file system that cannot map files, if it is not aligned, or if it is
    smaller than `MIN_MAPPED_BYTES`.

    Args:
        path: the file.
        offset: byte at which the array begins, as little-endian elements in row-major order.
        shape: shape of the array.
        dtype: dtype of the array.
    """
    if kernels.native is None or sys.byteorder != "little" or math.prod(shape) * dtype.size < MIN_MAPPED_BYTES:
        return None
    with contextlib.suppress(RuntimeError, ValueError):
        return kernels.native.mapped(os.fspath(path), offset, shape, dtype)
    return None
