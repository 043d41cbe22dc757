"""The command `mlx-esm` as a process to be killed: `python -m tests.abuse.child embed ...`

Without torch, which transformers would import: that takes seconds each time. It counts what it does to files beside its
output (opens to write, links, renames, removals). With KILL_AT in the environment it kills itself before that one, by
number, and with KILL_BEFORE before the first one whose path this regular expression fits.
"""

import os
import re
import signal
import sys

sys.modules["torch"] = None  # type: ignore[assignment]

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


class FileOperations:
    """An audit hook that counts, and kills."""

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
