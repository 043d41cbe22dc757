"""How a command ends when something is wrong with what it was given."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

# What loading and running raise for bad input; their messages say what to do. Others are bugs and show where.
EXPECTED = (OSError, ValueError, TypeError, RuntimeError)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Print an expected error as its message, and exit with 1."""
    try:
        yield
    except EXPECTED as error:
        Console(file=sys.stderr).print(
            f"[bold red]Error:[/] {escape(str(error))}", markup=True, highlight=False, soft_wrap=True
        )
        raise typer.Exit(1) from error
