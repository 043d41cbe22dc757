"""Run on a full disk, with a file size limit and on a read-only disk, while shards or the final output are written.

The command must report the reason without a traceback, leave no incomplete file, and resume once it can.
"""

import os
import re
import resource
import signal
import subprocess
import sys
from functools import partial

import pytest

from tests.abuse.command import FAILED, contents, is_finished, outputs, run, success_code

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0, reason="mounts a file system, which requires root"
)
PAGE = 4096


class Disk:
    """A file system in memory whose size can be changed."""

    def __init__(self, folder):
        self.folder = folder
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], check=True)

    def remount(self, options):
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)

    def fill(self, free_pages):
        """Shrink the file system to this number of free pages."""
        status = os.statvfs(self.folder)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        self.remount(f"size={used + free_pages * PAGE}")

    def unmount(self):
        subprocess.run(["umount", self.folder], check=True)


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.unmount()


def kill_points(case, folder):
    """Return {stage: pattern}. A run that is killed before the matching file continues with this file."""
    last = "index.csv" if case == "embed folder" else outputs(case, folder)[0].name
    prefix = re.escape(str(folder))
    return {
        "while writing shards": r".*/\.shard-00000002\..*",
        "while writing the output": rf"{prefix}(/out)?/\.{re.escape(last)}\..*\.part.*",
    }


def limit_file_size(size):
    """Limit the size of every file that this process writes. Runs in the child before the command."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.long
@pytest.mark.parametrize("stage", ["while writing shards", "while writing the output"])
def test_disk_is_full_or_read_only(case, stage, inputs, undisturbed, disk):
    arguments = inputs.command(case, disk.folder)
    code, printed = run(arguments, env={"KILL_BEFORE": kill_points(case, disk.folder)[stage]})
    assert code == -signal.SIGKILL, printed
    ends = {}
    disk.fill(0)
    ends["no free page"] = run(arguments)
    incomplete = incomplete_files(disk.folder, undisturbed[0])
    disk.remount("size=16m")
    ends["files of 100 bytes"] = run(arguments, preexec_fn=partial(limit_file_size, 100))
    incomplete += incomplete_files(disk.folder, undisturbed[0])
    ends["read-only"] = run_read_only(disk, arguments)
    incomplete += incomplete_files(disk.folder, undisturbed[0])
    disk.fill(1)
    ends["one free page"] = run(arguments)  # enough for some steps, and for all of a small result
    disk.remount("size=16m")
    reported = [name for name, (code, printed) in ends.items() if code == FAILED and is_reported(printed)]
    code, printed = run(arguments)
    print(f"{case}, {stage}: reported: {', '.join(reported)}; incomplete files: {len(incomplete)}")
    assert not incomplete
    assert set(reported) | {"one free page"} == ends.keys(), ends
    assert "one free page" in reported or ends["one free page"][0] == success_code(case), ends
    assert is_finished(case, code, printed), printed
    assert contents(disk.folder) == undisturbed[0]


def run_read_only(disk, arguments):
    disk.remount("ro")
    try:
        return run(arguments)
    finally:
        disk.remount("rw")


def is_reported(printed):
    """Return whether the command printed the reason as an error message, without a traceback."""
    reasons = ("No space left on device", "File too large", "Read-only file system")
    return "Traceback" not in printed and "Error: " in printed and any(reason in printed for reason in reasons)


PROGRESS = {"out/manifest.json", "out/checksums.txt"}  # updated during a run


def incomplete_files(folder, expected):
    """Return the temporary files in a folder, and the files whose content differs from that of a finished run."""
    files = contents(folder)
    temporary = [path for path in files if ".part" in path]
    named = (files.keys() & expected.keys()) - PROGRESS
    return temporary + [path for path in named if files[path] != expected[path]]
