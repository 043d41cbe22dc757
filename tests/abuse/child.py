"""The command `mlx-esm` as a process that can kill itself.

    python -m tests.abuse.child embed ...

It counts its operations on files in the output's folder: opening for writing, linking, renaming, removing. If the
environment variable KILL_AT is a number n, it kills itself before operation n. If KILL_BEFORE is a regular expression,
it kills itself before the first operation on a path that matches.
"""

import os
import sys

if "finetune" not in sys.argv:  # its scipy looks at torch
    sys.modules["torch"] = None  # type: ignore[assignment]  # keeps transformers from importing it, which takes seconds

if __name__ == "__main__":
    from mlx_esm_hf.cli import app
    from tests.killing import FileOperations

    folder = os.path.dirname(sys.argv[sys.argv.index("--output") + 1])
    operations = FileOperations(folder, int(os.environ.get("KILL_AT", 0)), os.environ.get("KILL_BEFORE", "never"))
    sys.addaudithook(operations)
    try:
        app()
    finally:
        print(f"file operations: {operations.count}", file=sys.stderr)
