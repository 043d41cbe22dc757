"""The number of threads that this process should compute on."""

from __future__ import annotations

import math
import os
from pathlib import Path

from mlx_esm_hf.runtime.cgroups import control_groups, lines_of


def thread_limits(root: Path = Path("/")) -> dict[str, int]:
    """Return each limit on the number of threads, by name. The kernels use the lowest.

    The limits are the cores that this process may run on; the CPU quota of its container or job, rounded up to whole
    cores; and `OMP_NUM_THREADS`, which users and schedulers set for other libraries.

    Args:
        root: the folder that holds proc/ and sys/.
    """
    limits = {"cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1}
    quota = cgroup_quota(root)
    if quota is not None:
        limits["cgroup quota"] = math.ceil(quota)
    wish = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # after a comma: for nested loops
    if wish.isdecimal() and int(wish) > 0:  # OpenMP also ignores other values
        limits["OMP_NUM_THREADS"] = int(wish)
    return limits


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """Return the lowest CPU quota of this process's control group and its parents, in cores; None without a quota."""
    quotas = [
        _quota_v2(folder) if version == 2 else _quota_v1(folder) for version, folder in control_groups("cpu", root)
    ]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_v2(folder: Path) -> float | None:
    match " ".join(lines_of(folder / "cpu.max")).split():
        case [quota, period] if quota != "max":
            return int(quota) / int(period)
    return None


def _quota_v1(folder: Path) -> float | None:
    quota, period = (lines_of(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota and period and int(quota[0]) > 0:  # -1 means no quota
        return int(quota[0]) / int(period[0])
    return None
