"""Memory that is kept for the next operation, and how much fits."""

from __future__ import annotations

import ctypes
import os
import sys

import mlx.core as mx

# glibc gives large blocks back to the system as soon as they are free, and an operation then waits for fresh pages,
# which takes several times as long as itself. These are mallopt's parameters (malloc.h) for the sizes at which it does.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB of freed memory for the next operation; other C libraries are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)


def free_memory() -> int:
    """Bytes of the default device's memory that are free; where the system does not say, all there are."""
    if mx.default_device() == mx.cpu:
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    info = mx.device_info()
    if "free_memory" in info:  # CUDA
        return int(info["free_memory"])
    total = info["memory_size"] if "memory_size" in info else info["total_memory"]  # as Metal, and as CUDA calls it
    return int(total) - mx.get_active_memory()


def batch_tokens(hidden_size: int) -> int:
    """How many tokens at a time bulk work should give the default device: enough to keep it busy, and no more than fit.

    A layer has some 16 arrays of float32 [tokens, hidden_size] at a time; an eighth of the free memory may go to them.
    """
    most = 2048 if mx.default_device() == mx.cpu else 16384
    return max(256, min(free_memory() // (8 * 16 * 4 * hidden_size), most))
