"""Options that `train` and `finetune` have, and what both print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Option("--output", help="A folder for the model, its checkpoints and the log.")]
Accumulate = Annotated[int, typer.Option(help="Batches to a step of the optimiser.", min=1)]
Steps = Annotated[
    int | None, typer.Option(help="Steps of the optimiser; by default as many as the epochs have.", min=1)
]
Epochs = Annotated[float, typer.Option(help="How often all of the data is seen.")]
LearningRate = Annotated[float, typer.Option(help="At the top of the schedule.")]
Schedule = Annotated[str, typer.Option(help="linear, cosine, constant or constant_with_warmup.")]
Warmup = Annotated[float, typer.Option(help="Steps over which the learning rate rises; below 1, the share of all.")]
WeightDecay = Annotated[float, typer.Option(help="AdamW's, for all but biases and layer norms.")]
Clip = Annotated[float, typer.Option(help="Largest norm of the gradients; 0, none.")]
Keep = Annotated[int, typer.Option(help="Checkpoints that are kept.", min=1)]
LogEvery = Annotated[int, typer.Option(help="Steps between lines of log.jsonl.", min=1)]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16, from weights in float32; for a GPU.")]
GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory, for a third more time.")
]
Seed = Annotated[int, typer.Option(help="Equal seeds give equal models.", min=0)]
Picture = Annotated[Path | None, typer.Option(help="A picture of the losses: .png, .svg or .pdf.")]


def print_summary(output: Path, perplexity: bool = False) -> None:
    """The last lines of the log: loss, and metrics of the validation data; of a language model its perplexity, too."""
    import json
    import math

    lines = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = next(line for line in reversed(lines) if "loss" in line)
    typer.echo(f"{trained['step']} steps, {trained['tokens']:,} tokens; loss {trained['loss']:.3f}: {output}", err=True)
    for line in reversed(lines):
        if "eval_loss" in line:
            measured = {name: x for name, x in line.items() if name.startswith("eval_") and name != "eval_runtime"}
            if perplexity:
                measured["perplexity"] = math.exp(line["eval_loss"])
            text = ", ".join(f"{name.removeprefix('eval_')} {value:.4g}" for name, value in measured.items())
            typer.echo(f"validation: {text}", err=True)
            return
