"""Run `mlx-esm` once for each argument, in one process.

    python -m tests.abuse.caller '["embed", ...]' ...

Prints a JSON line for each call: {"argument", "outcome", "code", "printed"}. The outcome is "bug" if the command ended
with an exception that is neither a user error nor an OSError; otherwise "done" or "refused".
"""

import json
import sys
import traceback

sys.modules["torch"] = None  # type: ignore[assignment]  # keeps transformers from importing torch

from typer.testing import CliRunner  # noqa: E402

from mlx_esm_hf.cli import app  # noqa: E402
from mlx_esm_hf.errors import UserError  # noqa: E402


def call(arguments):
    result = CliRunner().invoke(app, arguments)
    printed, outcome = result.output, "refused" if result.exit_code == 1 else "done"
    if error := unexpected_error(result.exception):
        outcome, printed = "bug", printed + "".join(traceback.format_exception(error))
    return {"outcome": outcome, "code": result.exit_code, "printed": printed}


def unexpected_error(error):
    """Return the exception that ended the command, or None if there is none, or it is a user error or an OSError."""
    while isinstance(error, SystemExit) or type(error).__name__ == "Exit":
        error = error.__cause__ or error.__context__
    return None if error is None or isinstance(error, (OSError, UserError)) else error


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps({"argument": argument, **call(json.loads(argument))}), flush=True)
