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


def run(*arguments, **environment):
    """What Python says where OMP_NUM_THREADS is not set, unless in `environment`."""
    without = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=without | environment, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.fixture
def native():
    from mlx_esm_hf.ops import kernels

    if kernels.native is None:
        pytest.skip(f"the kernels are {kernels.STATE}")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("cores", "environment"), [(1, {}), (0, {"OMP_NUM_THREADS": "1"}), (1, {"OMP_NUM_THREADS": "2"})]
)
def test_one_thread(cores, environment):
    assert run("-c", COUNT, str(cores), **environment).split() == ["1", "1", "1"]


@pytest.mark.usefixtures("native")
def test_a_thread_for_each_core(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run("-c", COUNT, "0").split() == [str(min(thread_limits().values()))] * 3


# In a container with a quota of one core, as its files say.
QUOTA = """
import ctypes, os, pathlib
files = {"/proc/self/cgroup": "0::/\\n", "/sys/fs/cgroup/cpu.max": "100000 100000\\n"}
read_text = pathlib.Path.read_text
pathlib.Path.read_text = lambda path, *rest, **named: files.get(str(path)) or read_text(path, *rest, **named)
from mlx_esm_hf.ops.kernels import native
path = next(line.split()[-1] for line in open("/proc/self/maps") if "scipy_openblas32/lib" in line)
print(native.threads(), ctypes.CDLL(path).scipy_openblas_get_num_threads(), os.environ.get("OPENBLAS_NUM_THREADS"))
"""


@pytest.mark.usefixtures("native")
def test_kernels_and_openblas_keep_to_a_quota(monkeypatch):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    assert run("-c", QUOTA).split() == ["1", "1", "1"]
    assert run("-c", QUOTA, OPENBLAS_NUM_THREADS="2").split()[2] == "2"


@pytest.mark.usefixtures("native")
def test_env_says_the_number_and_why():
    (row,) = [line for line in run("-m", "mlx_esm_hf", "env", OMP_NUM_THREADS="1").splitlines() if "threads of" in line]
    assert row.split("  ")[1].strip().startswith("1 (the least of: cores ") and row.rstrip().endswith(
        "OMP_NUM_THREADS 1)"
    )
