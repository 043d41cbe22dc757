"""The command `mlx-esm` as a process that can kill itself.

    python -m tests.abuse.child embed ...

It counts its operations on files in the output's folder: opening for writing, linking, renaming, removing. If the
environment variable KILL_AT is a number n, it kills itself before operation n. If KILL_BEFORE is a regular expression,
it kills itself before the first operation on a path that matches.
"""

import os
import re
import signal
import sys

sys.modules["torch"] = None  # type: ignore[assignment]  # keeps transformers from importing torch, which takes seconds

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


class FileOperations:
    """An audit hook that counts file operations and kills the process at the chosen one."""

    def __init__(self, folder, kill_at, kill_before):
        self.folder, self.kill_at, self.kill_before, self.count = folder, kill_at, kill_before, 0

    def __call__(self, event, arguments):
        changes = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES)
        if changes and str(arguments[0]).startswith(self.folder):
            self.count += 1
            if self.count == self.kill_at or re.fullmatch(self.kill_before, str(arguments[0])):
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    from mlx_esm_hf.cli import app

    folder = os.path.dirname(sys.argv[sys.argv.index("--output") + 1])
    operations = FileOperations(folder, int(os.environ.get("KILL_AT", 0)), os.environ.get("KILL_BEFORE", "never"))
    sys.addaudithook(operations)
    try:
        app()
    finally:
        print(f"file operations: {operations.count}", file=sys.stderr)
