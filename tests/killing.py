"""Processes that kill themselves before one of their file operations."""

import json
import os
import re
import signal
import sys
import traceback
from typing import Any, NamedTuple

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# The position of the descriptor of a folder that a relative path starts from, for each event.
CHANGES = {"os.link": 2, "os.rename": 2, "os.remove": 1, "os.mkdir": 2, "os.rmdir": 1}
SECONDS = 120  # far more than a forked process needs


class FileOperations:
    """An audit hook that counts file operations in a folder: opening for writing, linking, renaming, removing.

    Args:
        folder: where they are counted.
        kill_at: number of the operation before which the process kills itself; 0 for none.
        kill_before: it also kills itself before the first operation on a path that matches this regular expression.
        opens: whether to count files that are opened for writing.
    """

    def __init__(self, folder, kill_at=0, kill_before="never", opens=True):
        self.folder, self.kill_at, self.kill_before, self.opens = str(folder), kill_at, kill_before, opens
        self.count = 0

    def __call__(self, event, arguments):
        if event == "open" and self.opens:
            path = arguments[0] if isinstance(arguments[2], int) and arguments[2] & WRITES else None
        elif event in CHANGES:
            path = arguments[0]
            if (start := arguments[CHANGES[event]]) >= 0:  # as in `shutil.rmtree`
                path = os.path.join(os.readlink(f"/proc/self/fd/{start}"), path)
        else:
            return
        if path is not None and str(path).startswith(self.folder):
            self.count += 1
            if self.count == self.kill_at or re.fullmatch(self.kill_before, str(path)):
                os.kill(os.getpid(), signal.SIGKILL)


class Outcome(NamedTuple):
    """How a forked process ended: killed, or with the number of its file operations and a result or an error."""

    killed: bool
    operations: int = 0
    result: Any = None
    error: str | None = None


def forked(action, folder, kill_at=0, opens=True):
    """Run a function in a forked process and return its `Outcome`. It returns something that JSON can represent.

    A process that has computed with MLX or torch cannot be forked.
    """
    reader, writer = os.pipe()
    if not (child := os.fork()):
        signal.alarm(SECONDS)
        operations, result, error = FileOperations(folder, kill_at, opens=opens), None, None
        sys.addaudithook(operations)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        try:
            result = action()
        except BaseException:
            error = traceback.format_exc()
        with open(writer, "w") as pipe:
            json.dump([operations.count, result, error], pipe)
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        printed = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return Outcome(True) if status else Outcome(False, *json.loads(printed))
