"""The command `mlx-esm`: one file a command, each a thin face on a function of the package."""

from __future__ import annotations

import typer

from mlx_esm_hf.cli.contacts import contacts
from mlx_esm_hf.cli.embed import embed
from mlx_esm_hf.cli.env import env
from mlx_esm_hf.cli.fill_mask import fill_mask
from mlx_esm_hf.cli.generate import generate
from mlx_esm_hf.cli.perplexity import perplexity
from mlx_esm_hf.cli.score import score

app = typer.Typer(
    help="Meta's ESM protein language models on MLX.", no_args_is_help=True, pretty_exceptions_enable=False
)
for command in (embed, fill_mask, score, contacts, perplexity, generate, env):
    app.command()(command)
