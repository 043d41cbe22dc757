"""The command `mlx-esm`: one module per subcommand, each a plain function that calls a job.

A subcommand imports the job when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mlx_esm_hf.cli import (
    contacts,
    convert,
    embed,
    env,
    fill_mask,
    finetune,
    fold,
    generate,
    perplexity,
    push,
    score,
    train,
)
from mlx_esm_hf.cli.running import is_other_rank, notices, reporting_errors
from mlx_esm_hf.version import __version__


class Commands(TyperGroup):
    """The commands, with their errors and notices reported in one place."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with reporting_errors(), notices(shown=not is_other_rank()):
            return super().invoke(ctx)


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)


def print_version(wanted: bool) -> None:
    """Print the version and end the command."""
    if wanted:
        typer.echo(f"mlx-esm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Meta's ESM protein language models on MLX."""


app.command("embed")(embed.command)
app.command("fill-mask")(fill_mask.command)
app.command("score")(score.command)
app.command("contacts")(contacts.command)
app.command("fold")(fold.command)
app.command("perplexity")(perplexity.command)
app.command("generate")(generate.command)
app.command("train")(train.command)
app.command("finetune")(finetune.command)
app.command("convert")(convert.command)
app.command("push")(push.command)
app.command("env")(env.command)
