"""Running commands in this process. Unlike typer's `CliRunner`, the command line is built only once."""

from __future__ import annotations

import contextlib
import functools
import io
from typing import Any

from typer.main import get_command

from mlx_esm_hf.cli import app


@functools.cache
def command_line() -> Any:
    return get_command(app)


def invoke(*arguments: Any) -> tuple[int, str]:
    """Run a command. Return its exit code and its output in one line. Exceptions of bugs are raised."""
    output, code = io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            command_line().main([str(argument) for argument in arguments], prog_name="mlx-esm")
        except SystemExit as end:
            code = int(end.code or 0)
    return code, " ".join(output.getvalue().split())
