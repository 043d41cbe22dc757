"""The command `mlx-esm train`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from mlx_esm_hf.checks import MOST
from mlx_esm_hf.cli import options as opt
from mlx_esm_hf.cli.running import print_training_summary, training
from mlx_esm_hf.errors import UserError


def command(
    proteins: Annotated[list[Path], typer.Argument(help="FASTA files, plain, gzipped or zstandard-compressed.")],
    output: opt.OutputFolder,
    model: opt.OptionalModel = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Train a new ESM-2 of this shape: layers, hidden size and heads, such as 6,320,20."),
    ] = None,
    seed: opt.Seed = 0,
    weights: Annotated[
        str | None, typer.Option(help="Sampling weight of each file, such as 3,1.", rich_help_panel=opt.DATA)
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="FASTA file to validate with.", rich_help_panel=opt.DATA)
    ] = None,
    validation_share: Annotated[
        float,
        typer.Option(
            help="Fraction of the sequences to validate with, if --validation is not given; 0 for no validation.",
            callback=opt.number(0, below=1),
            rich_help_panel=opt.DATA,
        ),
    ] = 0.01,
    context: Annotated[
        int,
        typer.Option(
            help="Maximum tokens of a crop; longer proteins are cropped at random.",
            min=3,
            max=MOST,
            rich_help_panel=opt.DATA,
        ),
    ] = 512,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens per batch.", min=1, max=MOST, rich_help_panel=opt.OPTIMIZATION)
    ] = 8192,
    accumulate: opt.Accumulate = 1,
    steps: opt.Steps = None,
    epochs: opt.Epochs = 1.0,
    learning_rate: opt.LearningRate = 4e-4,
    schedule: opt.Schedule = "linear",
    warmup: opt.Warmup = 0.05,
    weight_decay: opt.WeightDecay = 0.01,
    clip: opt.Clip = 1.0,
    bf16: opt.Bf16 = False,
    gradient_checkpointing: opt.GradientCheckpointing = False,
    evaluate_every: Annotated[
        int, typer.Option(help="Steps between evaluations.", min=1, max=MOST, rich_help_panel=opt.SAVING)
    ] = 500,
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints.", min=1, max=MOST, rich_help_panel=opt.SAVING)
    ] = 500,
    keep: opt.Keep = 2,
    log_every: opt.LogEvery = 10,
    picture: opt.Picture = None,
    device: opt.Device = None,
    quiet: opt.Quiet = False,
) -> None:
    """Train a masked language model with ESM's objective, from scratch (--shape) or from a checkpoint (--model).

    Writes a folder with the model, which every other command accepts, its checkpoints and log.jsonl. Run the same
    command again to resume an interrupted training.

    Example: mlx-esm train proteins.fasta --shape 6,320,20 --steps 2000 --output my-esm
    """
    with training(output, quiet) as run:
        from mlx_esm_hf.data.proteins import Report
        from mlx_esm_hf.runs.outputs import check_outputs, check_picture
        from mlx_esm_hf.runtime.device import use_device
        from mlx_esm_hf.training.pretrain import pretrain

        if (model is None) == (shape is None):
            raise UserError("Give `--model` to continue training a model or `--shape` for a new one, not both.")
        check_picture(picture)
        check_outputs(None, (), picture)
        use_device(device)
        report = Report()
        pretrain(
            proteins,
            output,
            model or parse_shape(shape or ""),
            weights=None if weights is None else parse_weights(weights),
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
            from mlx_esm_hf.training.picture import draw_losses

            draw_losses(output, picture)
    if not run.quiet:
        print_training_summary(output, perplexity=True)
    run.finish(output, report)


def parse_shape(text: str) -> tuple[int, int, int]:
    """Return the layers, hidden size and heads of --shape.

    Raises:
        UserError: the text is not three positive integers, or the hidden size does not suit the heads.
    """
    from mlx_esm_hf.training.pretrain import check_shape

    parts = opt.parse_list(text)
    if len(parts) != 3 or not all(part.isascii() and part.isdecimal() and len(part) <= 9 for part in parts):
        raise UserError(
            f"--shape must be three positive integers, layers,hidden size,heads, such as 6,320,20; got {text}."
        )
    layers, hidden_size, heads = (int(part) for part in parts)
    try:
        check_shape(layers, hidden_size, heads)
    except UserError as error:
        raise UserError(f"--shape {text}: {error}") from None
    return layers, hidden_size, heads


def parse_weights(text: str) -> list[float]:
    """Return the numbers of --weights.

    Raises:
        UserError: an entry is not a number.
    """
    try:
        weights = [float(part) for part in opt.parse_list(text)]
    except ValueError:
        weights = []
    if not weights or not all(0 <= weight < math.inf for weight in weights):
        raise UserError(f"--weights must be a comma-separated list of numbers such as 3,1, got {text}.")
    return weights
