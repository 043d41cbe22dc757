"""A disk that is full, files that may not grow, a folder that is read-only: in the shards, and at the end.

The command says so in a sentence, leaves nothing half-written, and goes on when it can.
"""

import os
import re
import resource
import signal
import subprocess
import sys
from functools import partial

import pytest

from tests.abuse.command import FAILED, contents, done, has_ended, outputs, run

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0, reason="mounts a disk of its own, which takes root"
)
PAGE = 4096


class Disk:
    """A file system in memory, with a size that can be changed."""

    def __init__(self, folder):
        self.folder = folder
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], check=True)

    def remount(self, options):
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)

    def fill(self, free_pages):
        """Leave room for so many pages."""
        found = os.statvfs(self.folder)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        self.remount(f"size={used + free_pages * PAGE}")

    def unmount(self):
        subprocess.run(["umount", self.folder], check=True)


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.unmount()


def places(case, folder):
    """Before which file a run is killed, so that what comes next is this file: of the shards, and of the end."""
    last = "index.csv" if case == "embed folder" else outputs(case, folder)[0].name
    parts = re.escape(str(folder))
    return {
        "in the shards": r".*/\.shard-00000002\..*",
        "at the end": rf"{parts}(/out)?/\.{re.escape(last)}\..*\.part.*",
    }


def limit_files(size):
    """In the child: no file may become larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.long
@pytest.mark.parametrize("place", ["in the shards", "at the end"])
def test_no_room(case, place, inputs, whole, disk):
    arguments = inputs.command(case, disk.folder)
    code, said = run(arguments, env={"KILL_BEFORE": places(case, disk.folder)[place]})
    assert code == -signal.SIGKILL, said
    ends = {}
    disk.fill(0)
    ends["no page left"] = run(arguments)
    left = half_written(disk.folder, whole[0])
    disk.remount("size=16m")
    ends["files of 100 bytes"] = run(arguments, preexec_fn=partial(limit_files, 100))
    left += half_written(disk.folder, whole[0])
    ends["read-only"] = read_only(disk, arguments)
    left += half_written(disk.folder, whole[0])
    disk.fill(1)
    ends["a page left"] = run(arguments)  # room for some, and for small results
    disk.remount("size=16m")
    told = [name for name, (code, said) in ends.items() if code == FAILED and is_told(said)]
    code, said = run(arguments)
    print(f"{case}, {place}: told in a sentence: {', '.join(told)}; half-written: {len(left)}")
    assert not left
    assert set(told) | {"a page left"} == ends.keys(), ends
    assert "a page left" in told or ends["a page left"][0] == done(case), ends
    assert has_ended(case, code, said), said
    assert contents(disk.folder) == whole[0]


def read_only(disk, arguments):
    disk.remount("ro")
    try:
        return run(arguments)
    finally:
        disk.remount("rw")


def is_told(said):
    """Whether the reason is told in a sentence, with what to do."""
    reasons = ("No space left on device", "File too large", "Read-only file system")
    return "Traceback" not in said and "Error: " in said and any(reason in said for reason in reasons)


GROWING = {"out/manifest.json", "out/checksums.txt"}  # say how far a run is


def half_written(folder, expected):
    """The parts of files, and the files that have their names and are not what they should be."""
    found = contents(folder)
    parts = [path for path in found if ".part" in path]
    whole = (found.keys() & expected.keys()) - GROWING
    return parts + [path for path in whole if found[path] != expected[path]]
