"""Run `mlx-esm` once for each argument, in one process.

    python -m tests.abuse.caller '["embed", ...]' ...

Prints a JSON line for each call: {"argument", "outcome", "code", "printed"}. The outcome is "bug" if the command ended
with an exception that is neither an OSError nor raised by a `raise` statement of the package; otherwise "done" or
"refused".
"""

import json
import sys
import traceback
from pathlib import Path

sys.modules["torch"] = None  # type: ignore[assignment]  # keeps transformers from importing torch

from typer.testing import CliRunner  # noqa: E402

import mlx_esm_hf  # noqa: E402
from mlx_esm_hf.cli import app  # noqa: E402

PACKAGE = Path(mlx_esm_hf.__file__).parent


def call(arguments):
    result = CliRunner().invoke(app, arguments)
    printed, outcome = result.output, "refused" if result.exit_code == 1 else "done"
    if error := unexpected_error(result.exception):
        outcome, printed = "bug", printed + "".join(traceback.format_exception(error))
    return {"outcome": outcome, "code": result.exit_code, "printed": printed}


def unexpected_error(error):
    """Return the exception that ended the command, or None if the package raised it on purpose or it is an OSError."""
    while isinstance(error, SystemExit) or type(error).__name__ == "Exit":
        error = error.__cause__ or error.__context__
    if error is None or isinstance(error, OSError):
        return None
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return None if PACKAGE in Path(frame.filename).parents and frame.line.startswith("raise ") else error


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps({"argument": argument, **call(json.loads(argument))}), flush=True)
