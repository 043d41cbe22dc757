"""Free memory: limits of the machine, of control groups and of the shell."""

import resource

import pytest

from mlx_esm_hf.runtime.memory import free_host_memory

MEMINFO = "MemTotal:       16000000 kB\nMemFree:          100000 kB\nMemAvailable:    8000000 kB\n"
MACHINE = 8000000 * 1024


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Write the files of a machine. Nothing else limits its memory."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def write(files):
        for name, text in {"proc/meminfo": MEMINFO, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
JOB = {"proc/self/cgroup": "0::/job/step\n"}
OLD = {"proc/self/cgroup": "5:cpuset:/\n4:memory:/job\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, MACHINE),  # page cache counts as free
        (JOB | {f"{V2}/job/memory.max": "5000\n", f"{V2}/job/memory.current": "2000\n"}, 3000),
        (
            JOB
            | {f"{V2}/job/step/memory.max": "5000\n", f"{V2}/job/step/memory.current": "2000\n"}
            | {f"{V2}/job/step/memory.stat": "anon 100\ninactive_file 700\n"},
            3700,
        ),
        (JOB | {f"{V2}/job/memory.max": "max\n", f"{V2}/job/memory.current": "2000\n"}, MACHINE),
        (JOB | {f"{V2}/memory.max": "5000\n", f"{V2}/memory.current": "6000\n"}, 0),
        (
            OLD
            | {f"{V1}/job/memory.limit_in_bytes": "5000\n", f"{V1}/job/memory.usage_in_bytes": "2000\n"}
            | {f"{V1}/job/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n"},
            3500,
        ),
        (OLD | {f"{V1}/memory.limit_in_bytes": f"{2**63 - 4096}\n", f"{V1}/memory.usage_in_bytes": "9\n"}, MACHINE),
    ],
)
def test_free_memory(files, free, root):
    assert free_host_memory(root(files)) == free


def test_limit_of_the_shell(root, monkeypatch):
    """`ulimit -v` limits the address space."""
    folder = root({"proc/self/statm": "10 5 1 1 0 1 0\n"})
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1 << 30, 1 << 30))
    assert free_host_memory(folder) == (1 << 30) - 10 * resource.getpagesize()
