"""A limit of memory: the command says that there is too little, or is killed by the system, and goes on with more."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.abuse.command import FAILED, contents, done, run

GROUP = Path("/sys/fs/cgroup/memory")  # version 1; version 2 has all controllers in one tree
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not os.access(GROUP / "cgroup.procs", os.W_OK),
    reason="needs a memory cgroup that it may write",
)
MEGABYTES = (20, 30, 40, 50, 60, 80, 120, 200, 400)


@pytest.fixture
def group(request):
    folder = GROUP / f"mlx-esm-abuse-{os.getpid()}"
    folder.mkdir()
    yield folder
    folder.rmdir()


def enter(group):
    """In the child: into the group, with all that it becomes."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


@pytest.mark.long
def test_little_memory(case, inputs, whole, group, tmp_path):
    arguments, ends = inputs.command(case, tmp_path), []
    for megabytes in MEGABYTES:
        (group / "memory.limit_in_bytes").write_text(f"{megabytes}M")
        ends.append(run(arguments, preexec_fn=partial(enter, group)))
        if ends[-1][0] == done(case):
            break
    killed = [code for code, _ in ends if code == -signal.SIGKILL]
    told = [said for code, said in ends if code == FAILED and "Traceback" not in said]
    print(f"{case}: {len(killed)} killed, {len(told)} told, done with {MEGABYTES[len(ends) - 1]} MB")
    assert len(killed) + len(told) + 1 == len(ends) and ends[-1][0] == done(case), ends
    assert killed or told
    assert contents(tmp_path) == whole[0]
