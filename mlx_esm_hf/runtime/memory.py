"""Memory: keeping freed blocks for reuse, and how much is free."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

import mlx.core as mx

from mlx_esm_hf.runtime.cgroups import control_groups, lines_of
from mlx_esm_hf.runtime.costs import costs

# glibc returns large blocks to the system as soon as they are freed. The next operation then waits for new pages, which
# takes several times as long as the operation itself. These parameters of mallopt (malloc.h) set the size thresholds.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Make glibc keep up to 1 GiB of freed memory for the next operation. Has no effect on other C libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)


def evaluate(x: mx.array) -> None:
    """Evaluate `x` now, unless `mx.compile` or `mx.vmap` is tracing it."""
    with contextlib.suppress(ValueError):
        mx.eval(x)


def free_memory() -> int:
    """Return the bytes of memory that are free on the default device.

    A GPU that does not report its free memory counts as holding nothing but MLX's own arrays.
    """
    if mx.default_device() == mx.cpu:
        return free_host_memory()
    info = mx.device_info()
    if "free_memory" in info:  # CUDA
        return int(info["free_memory"])
    total = info["memory_size"] if "memory_size" in info else info["total_memory"]  # the names in Metal and in CUDA
    return int(total) - mx.get_active_memory()


def free_host_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process can still allocate.

    The machine, the control groups and `ulimit -v` each set a limit, and the lowest counts.

    Args:
        root: the folder that holds proc/ and sys/.
    """
    machine = {line.split(":")[0]: line.split()[1] for line in lines_of(root / "proc/meminfo")}
    if "MemAvailable" in machine:
        free = [1024 * int(machine["MemAvailable"])]
    else:
        free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for version, folder in control_groups("memory", root):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (lines_of(folder / name) for name in names)
        if limit and used and limit[0].isdecimal():  # "max" means no limit
            free.append(int(limit[0]) - int(used[0]) + _reclaimable(folder))
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = " ".join(lines_of(root / "proc/self/statm")).split()
    if most != resource.RLIM_INFINITY and pages:
        free.append(most - int(pages[0]) * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(free))


def _reclaimable(folder: Path) -> int:
    """Return the bytes of page cache that a control group gives up when it needs the memory."""
    counts = dict(line.split() for line in lines_of(folder / "memory.stat"))
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


def peak_memory() -> int:
    """Return the peak memory of this process in bytes; on a GPU, the peak of MLX's arrays there."""
    if mx.default_device() != mx.cpu:
        return mx.get_peak_memory()
    for line in lines_of(Path("/proc/self/status")):
        if line.startswith("VmHWM"):  # unlike ru_maxrss, not inherited from the parent process
            return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def batch_tokens(hidden_size: int) -> int:
    """Return the tokens per batch for bulk work on the default device: enough to keep it busy, if they fit in memory.

    A layer holds about 16 float32 arrays [tokens, hidden_size] at a time, which may take an eighth of the free memory.
    """
    return max(256, min(free_memory() // (8 * 16 * 4 * hidden_size), costs().max_batch_tokens))
