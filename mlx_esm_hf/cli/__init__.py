"""The command `mlx-esm`: one file a command, each a thin face on a function of the package."""

from __future__ import annotations

import typer

from mlx_esm_hf.cli.embed import embed
from mlx_esm_hf.cli.env import env

app = typer.Typer(
    help="Meta's ESM protein language models on MLX.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.command()(embed)
app.command()(env)
