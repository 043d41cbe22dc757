"""Limit the memory: the command must report it, or is killed by the kernel, and resumes once it has enough."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.abuse.command import FAILED, contents, run, success_code

GROUP = Path("/sys/fs/cgroup/memory")  # cgroup version 1; version 2 has no folder for each controller
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not os.access(GROUP / "cgroup.procs", os.W_OK),
    reason="needs a writable memory cgroup (version 1)",
)
MEGABYTES = (20, 30, 40, 50, 60, 80, 120, 200, 400)


@pytest.fixture
def group(request):
    folder = GROUP / f"mlx-esm-abuse-{os.getpid()}"
    folder.mkdir()
    yield folder
    folder.rmdir()


def enter(group):
    """Move this process into the group. Runs in the child before the command."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


@pytest.mark.long
def test_memory_limit(case, inputs, undisturbed, group, tmp_path):
    arguments, ends = inputs.command(case, tmp_path), []
    for megabytes in MEGABYTES:
        (group / "memory.limit_in_bytes").write_text(f"{megabytes}M")
        ends.append(run(arguments, preexec_fn=partial(enter, group)))
        if ends[-1][0] == success_code(case):
            break
    killed = [code for code, _ in ends if code == -signal.SIGKILL]
    reported = [printed for code, printed in ends if code == FAILED and "Traceback" not in printed]
    print(f"{case}: {len(killed)} killed, {len(reported)} reported, done with {MEGABYTES[len(ends) - 1]} MB")
    assert len(killed) + len(reported) + 1 == len(ends) and ends[-1][0] == success_code(case), ends
    assert killed or reported
    assert contents(tmp_path) == undisturbed[0]
