"""How many threads this process should compute on."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath


def thread_limits(root: Path = Path("/")) -> dict[str, int]:
    """What bounds the number of threads, and at how many: the least is what the kernels take.

    The cores that this process may run on; a container's or job's share of processor time, rounded up to whole cores;
    and `OMP_NUM_THREADS`, which is how users and schedulers tell this to other libraries.

    Args:
        root: the folder that has proc/ and sys/.
    """
    limits = {"cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1}
    quota = cgroup_quota(root)
    if quota is not None:
        limits["cgroup quota"] = math.ceil(quota)
    wish = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # behind a comma, of nested loops
    if wish.isdecimal() and int(wish) > 0:  # OpenMP, too, ignores what is no such number
        limits["OMP_NUM_THREADS"] = int(wish)
    return limits


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """The least share of processor time, in cores, that this process's control group and those above it have.

    None where there is no quota. In a container the path of its group may be one of the host; what can then be seen is
    the topmost folder, which is the container's own.
    """
    quotas = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        parts = PurePosixPath(path).parts[1:]
        if not controllers:  # version 2
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "cpu" in controllers.split(","):  # version 1
            mounts = [root / "sys/fs/cgroup" / name for name in dict.fromkeys((controllers, "cpu"))]
        else:
            continue
        folders = [mount.joinpath(*parts[:n]) for mount in mounts for n in range(len(parts) + 1)]
        quotas += [_quota_v1(folder) if controllers else _quota_v2(folder) for folder in folders]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_v2(folder: Path) -> float | None:
    match " ".join(_lines(folder / "cpu.max")).split():
        case [quota, period] if quota != "max":
            return int(quota) / int(period)
    return None


def _quota_v1(folder: Path) -> float | None:
    quota, period = (_lines(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota and period and int(quota[0]) > 0:  # -1: none
        return int(quota[0]) / int(period[0])
    return None


def _lines(path: Path) -> list[str]:
    """Of a file; none where it is missing or must not be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
