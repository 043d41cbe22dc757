"""Arrays in a file, without reading it: the system reads their numbers when they are used, and may forget them again.

The file has to stay as it is while somebody has such an array. Who writes it anew puts another file into its
place, as is done here.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Sequence

import mlx.core as mx

from mlx_esm_hf.ops import kernels

# Bytes of an array from which on it is mapped: each takes up to two pages more than it fills, and calls of the system.
MAPPED_FROM = 1 << 18


def mapped(path: str | os.PathLike[str], offset: int, shape: Sequence[int], dtype: mx.Dtype) -> mx.array | None:
    """The little-endian numbers from `offset` on, in bytes, row by row; None where they have to be read: without
    kernels, on a file system that cannot do it, of numbers that are not aligned, and of few."""
    if kernels.native is None or sys.byteorder != "little" or math.prod(shape) * dtype.size < MAPPED_FROM:
        return None
    with contextlib.suppress(RuntimeError, ValueError):
        return kernels.native.mapped(os.fspath(path), offset, shape, dtype)
    return None
