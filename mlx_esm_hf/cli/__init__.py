"""The command `mlx-esm`: one module per subcommand, each a plain function that calls a job.

A subcommand imports the job when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import typer

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

app = typer.Typer(
    help="Meta's ESM protein language models on MLX.", no_args_is_help=True, pretty_exceptions_enable=False
)
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
