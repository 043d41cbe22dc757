"""Gives arguments to `mlx-esm`, one call after the other, in a process that may die of one:
`python -m tests.abuse.caller '["embed", ...]' ...`

For each a line of JSON: {"argument", "outcome", "code", "said"}. The outcome is "bug" if there was a traceback, or a
message of an error that no line of the package raised to be told; else "done" or "refused".
"""

import json
import sys
import traceback
from pathlib import Path

sys.modules["torch"] = None  # type: ignore[assignment]

from typer.testing import CliRunner  # noqa: E402

import mlx_esm_hf  # noqa: E402
from mlx_esm_hf.cli import app  # noqa: E402

PACKAGE = Path(mlx_esm_hf.__file__).parent


def call(arguments):
    result = CliRunner().invoke(app, arguments)
    said, outcome = result.output, "refused" if result.exit_code == 1 else "done"
    if error := unmeant(result.exception):
        outcome, said = "bug", said + "".join(traceback.format_exception(error))
    return {"outcome": outcome, "code": result.exit_code, "said": said}


def unmeant(error):
    """What ended the command, if it was a bug: neither an exit, nor the operating system's, nor raised by us."""
    while isinstance(error, SystemExit) or type(error).__name__ == "Exit":
        error = error.__cause__ or error.__context__
    if error is None or isinstance(error, OSError):
        return None
    place = traceback.extract_tb(error.__traceback__)[-1]
    return None if PACKAGE in Path(place.filename).parents and place.line.startswith("raise ") else error


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps({"argument": argument, **call(json.loads(argument))}), flush=True)
