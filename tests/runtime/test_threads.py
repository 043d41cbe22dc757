"""How many threads there should be: cores, a share of their time, and the user's word."""

import os
import subprocess
import sys

import pytest

from mlx_esm_hf.runtime.threads import cgroup_quota, thread_limits

# Files below a root folder, and the quota that they mean.
LAYOUTS = {
    "a container, version 2": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"},
        2.0,
    ),
    "no quota, version 2": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"},
        None,
    ),
    "a systemd unit in a slice that has less": (
        {
            "proc/self/cgroup": "0::/user.slice/user-1000.slice/run-1.scope\n",
            "sys/fs/cgroup/user.slice/cpu.max": "max 100000\n",
            "sys/fs/cgroup/user.slice/user-1000.slice/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/user.slice/user-1000.slice/run-1.scope/cpu.max": "800000 100000\n",
        },
        1.5,
    ),
    "a container, version 1, whose path is the host's": (
        {
            "proc/self/cgroup": "3:memory:/docker/4f0c\n2:cpuset:/docker/4f0c\n1:cpu,cpuacct:/docker/4f0c\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        0.5,
    ),
    "version 1, of a job and its parent": (
        {
            "proc/self/cgroup": "4:cpuacct,cpu:/slurm/job_7/step_0\n0::/system.slice\n",
            "sys/fs/cgroup/cpu/slurm/job_7/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/slurm/job_7/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/slurm/job_7/step_0/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/slurm/job_7/step_0/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/unified/system.slice/cgroup.procs": "1\n",
        },
        4.0,
    ),
    "no quota, version 1": (
        {
            "proc/self/cgroup": "1:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "nothing mounted": ({"proc/self/cgroup": "0::/a/b\n"}, None),
    "no control groups": ({}, None),
}


def write(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


@pytest.mark.parametrize(("files", "quota"), LAYOUTS.values(), ids=LAYOUTS)
def test_quota(tmp_path, files, quota):
    write(tmp_path, files)
    assert cgroup_quota(tmp_path) == quota


@pytest.mark.parametrize(("quota", "threads"), [("50000", 1), ("100000", 1), ("150000", 2), ("1600000", 16)])
def test_quota_is_rounded_up(tmp_path, quota, threads):
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"})
    assert thread_limits(tmp_path)["cgroup quota"] == threads


@pytest.mark.parametrize(
    ("value", "threads"),
    [("3", 3), ("5,2", 5), (" 4 ", 4), ("0", None), ("-1", None), ("many", None), ("", None)],
)
def test_omp_num_threads(tmp_path, monkeypatch, value, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert thread_limits(tmp_path).get("OMP_NUM_THREADS") == threads


# Threads are counted by the system, before and after a product that is large enough for all of them.
COUNT = """
import os, sys
cores = int(sys.argv[1])
if cores:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
import mlx.core as mx
from mlx_esm_hf.ops.kernels import STATE, native
x = mx.ones((600, 64))
mx.eval(x + x)
before = len(os.listdir("/proc/self/task"))
mx.eval(native.linear(x, x))
print(native.threads(), 1 + len(os.listdir("/proc/self/task")) - before, STATE.rpartition(" ")[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="for Linux")
@pytest.mark.parametrize(
    ("cores", "wish"), [(0, None), (1, None), (0, "1"), (1, "2")], ids=["all", "one core", "OMP 1", "one core, OMP 2"]
)
def test_threads_of_the_kernels(cores, wish):
    from mlx_esm_hf.ops import kernels

    if kernels.native is None:
        pytest.skip(f"the kernels are {kernels.STATE}")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if wish is not None:
        environment["OMP_NUM_THREADS"] = wish
    counted = subprocess.run(
        [sys.executable, "-c", COUNT, str(cores)], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    if cores == 1 or wish == "1":
        expected = 1
    else:
        limits = thread_limits()
        expected = min(n for name, n in limits.items() if name != "OMP_NUM_THREADS")
    assert counted == [str(expected)] * 3
