"""The command `mlx-esm` as a process to be killed: `python -m tests.abuse.child embed ...`

Without torch, which transformers would import: that takes seconds each time. It counts what it does to files beside its
output (opens to write, links, renames, removals), and with KILL_AT in the environment kills itself before that many.
"""

import os
import signal
import sys

sys.modules["torch"] = None  # type: ignore[assignment]

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


class FileOperations:
    """An audit hook that counts, and kills."""

    def __init__(self, folder, kill_at):
        self.folder, self.kill_at, self.count = folder, kill_at, 0

    def __call__(self, event, arguments):
        changes = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES)
        if changes and str(arguments[0]).startswith(self.folder):
            self.count += 1
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    from mlx_esm_hf.cli import app

    folder = os.path.dirname(sys.argv[sys.argv.index("--output") + 1])
    operations = FileOperations(folder, int(os.environ.get("KILL_AT", 0)))
    sys.addaudithook(operations)
    try:
        app()
    finally:
        print(f"file operations: {operations.count}", file=sys.stderr)
