"""Memory that is kept for the next operation, and how much fits."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

import mlx.core as mx

from mlx_esm_hf.runtime.cgroups import control_groups, lines_of

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


def evaluate(x: mx.array) -> None:
    """Compute `x` now, but for the time while it is being traced by `mx.compile` or `mx.vmap`."""
    with contextlib.suppress(ValueError):
        mx.eval(x)


def free_memory() -> int:
    """Bytes of memory that the default device can still give; where the system does not say, all there are."""
    if mx.default_device() == mx.cpu:
        return free_host_memory()
    info = mx.device_info()
    if "free_memory" in info:  # CUDA
        return int(info["free_memory"])
    total = info["memory_size"] if "memory_size" in info else info["total_memory"]  # as Metal, and as CUDA calls it
    return int(total) - mx.get_active_memory()


def free_host_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still get: of the machine, of its control groups, and within `ulimit -v`.

    Args:
        root: the folder that has proc/ and sys/.
    """
    machine = {line.split(":")[0]: line.split()[1] for line in lines_of(root / "proc/meminfo")}
    if "MemAvailable" in machine:
        free = [1024 * int(machine["MemAvailable"])]
    else:
        free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for version, folder in control_groups("memory", root):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (lines_of(folder / name) for name in names)
        if limit and used and limit[0].isdecimal():  # "max": none
            free.append(int(limit[0]) - int(used[0]) + _reclaimable(folder))
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = " ".join(lines_of(root / "proc/self/statm")).split()
    if most != resource.RLIM_INFINITY and pages:
        free.append(most - int(pages[0]) * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(free))


def _reclaimable(folder: Path) -> int:
    """Bytes of files that a control group has in memory and gives up when it needs them."""
    counts = dict(line.split() for line in lines_of(folder / "memory.stat"))
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


def peak_memory() -> int:
    """Bytes that this process has had at most; on a GPU, those that MLX has had there."""
    if mx.default_device() != mx.cpu:
        return mx.get_peak_memory()
    for line in lines_of(Path("/proc/self/status")):
        if line.startswith("VmHWM"):  # ru_maxrss is inherited from the process that started this one
            return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def batch_tokens(hidden_size: int) -> int:
    """How many tokens at a time bulk work should give the default device: enough to keep it busy, and no more than fit.

    A layer has some 16 arrays of float32 [tokens, hidden_size] at a time; an eighth of the free memory may go to them.
    """
    most = 2048 if mx.default_device() == mx.cpu else 16384
    return max(256, min(free_memory() // (8 * 16 * 4 * hidden_size), most))
