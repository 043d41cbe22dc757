"""mlx-esm train"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_esm_hf.cli import training_options as options
from mlx_esm_hf.cli.options import Device, OptionalModel, Quiet, listed
from mlx_esm_hf.cli.running import running
from mlx_esm_hf.errors import UserError


def command(
    proteins: Annotated[list[Path], typer.Argument(help="FASTA files, plain, gzipped or zstandard-compressed.")],
    output: options.Folder,
    model: OptionalModel = None,
    shape: Annotated[
        str | None, typer.Option(help="Of a new ESM-2 instead: layers, hidden size and heads, such as 6,320,20.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="How often each file is drawn from, such as 3,1.")] = None,
    validation: Annotated[Path | None, typer.Option(help="FASTA to validate with.")] = None,
    validation_share: Annotated[float, typer.Option(help="Without it, the share of the sequences held out.")] = 0.01,
    context: Annotated[int, typer.Option(help="Most tokens of a piece of a protein.", min=3)] = 512,
    batch_tokens: Annotated[int, typer.Option(help="Tokens to a batch.", min=1)] = 8192,
    accumulate: options.Accumulate = 1,
    steps: options.Steps = None,
    epochs: options.Epochs = 1.0,
    learning_rate: options.LearningRate = 4e-4,
    schedule: options.Schedule = "linear",
    warmup: options.Warmup = 0.05,
    weight_decay: options.WeightDecay = 0.01,
    clip: options.Clip = 1.0,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations.", min=1)] = 500,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 500,
    keep: options.Keep = 2,
    log_every: options.LogEvery = 10,
    bf16: options.Bf16 = False,
    gradient_checkpointing: options.GradientCheckpointing = False,
    seed: options.Seed = 0,
    picture: options.Picture = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Train a masked language model of proteins, from scratch (--shape) or further (--model), by ESM's objective.

    The output is a folder with the model, which every other command takes, checkpoints and log.jsonl. A training that
    was stopped goes on when the same command is given again.

    Example: mlx-esm train proteins.fasta --shape 6,320,20 --steps 2000 --output my-esm
    """
    with running(output, quiet=True) as run:
        from mlx_esm_hf.data.proteins import Report
        from mlx_esm_hf.runtime.device import use_device
        from mlx_esm_hf.training.picture import check_picture_of, draw_losses
        from mlx_esm_hf.training.pretrain import pretrain

        if (model is None) == (shape is None):
            raise UserError("Either --model, to train further, or --shape, of a new model, is needed.")
        check_picture_of(picture)
        use_device(device)
        report = Report()
        pretrain(
            proteins,
            output,
            model or shape_of(shape or ""),
            weights=None if weights is None else numbers(weights),
            validation=validation,
            validation_share=validation_share,
            context=context,
            report=report,
            batch_tokens=batch_tokens,
            gradient_accumulation_steps=accumulate,
            max_steps=steps or -1,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            lr_scheduler_type=schedule,
            warmup_steps=warmup,
            weight_decay=weight_decay,
            max_grad_norm=clip,
            eval_strategy="steps" if validation or validation_share else "no",
            eval_steps=evaluate_every,
            save_steps=save_every,
            save_total_limit=keep,
            logging_steps=log_every,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
            disable_tqdm=True if quiet else None,
        )
        if picture is not None:
            draw_losses(output, picture)
    if not quiet:
        options.print_summary(output, perplexity=True)
    run.finish(output, report)


def shape_of(text: str) -> tuple[int, int, int]:
    """Layers, hidden size and heads.

    Raises:
        ValueError: the text is not of three such numbers.
    """
    parts = listed(text)
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--shape {text}: layers, hidden size and heads are needed, such as 6,320,20.")
    layers, hidden_size, heads = (int(part) for part in parts)
    if hidden_size % (2 * heads):
        raise UserError(f"--shape {text}: the hidden size must be a multiple of twice the number of heads.")
    return layers, hidden_size, heads


def numbers(text: str) -> list[float]:
    """
    Raises:
        ValueError: what is no number.
    """
    try:
        return [float(part) for part in listed(text)]
    except ValueError:
        raise UserError(f"--weights {text}: numbers are needed, such as 3,1.") from None
