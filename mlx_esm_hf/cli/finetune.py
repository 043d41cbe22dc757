"""The command `mlx-esm finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_esm_hf.checks import MOST, MOST_RANK
from mlx_esm_hf.cli import options as opt
from mlx_esm_hf.cli.running import print_training_summary, training


def command(
    table: Annotated[Path, typer.Argument(help="Labelled proteins: .csv, .tsv or .parquet.")],
    model: opt.Model,
    output: opt.OutputFolder,
    task: Annotated[
        str, typer.Option(help="classification, regression, or residues (one letter per residue, - for no label).")
    ] = "classification",
    train: Annotated[
        str, typer.Option(help="What to train: lora, dora, full, or head (the encoder stays frozen).")
    ] = "lora",
    seed: opt.Seed = 0,
    sequence_column: Annotated[
        str, typer.Option(help="Column with the sequences.", rich_help_panel=opt.DATA)
    ] = "sequence",
    label_column: Annotated[str, typer.Option(help="Column with the labels.", rich_help_panel=opt.DATA)] = "label",
    validation: Annotated[Path | None, typer.Option(help="Table to validate with.", rich_help_panel=opt.DATA)] = None,
    validation_share: Annotated[
        float,
        typer.Option(
            help="Fraction of the sequences to validate with, if --validation is not given.",
            callback=opt.number(above=0, below=1),
            rich_help_panel=opt.DATA,
        ),
    ] = 0.1,
    rank: Annotated[
        int, typer.Option(help="Rank of LoRA's matrices.", min=1, max=MOST_RANK, rich_help_panel=opt.ADAPTERS)
    ] = 8,
    alpha: Annotated[
        float,
        typer.Option(
            help="LoRA's output is scaled by alpha / rank.", callback=opt.number(), rich_help_panel=opt.ADAPTERS
        ),
    ] = 16,
    dropout: Annotated[
        float,
        typer.Option(
            help="Dropout of LoRA's input.",
            callback=opt.number(0, below=1),
            rich_help_panel=opt.ADAPTERS,
        ),
    ] = 0.0,
    target_modules: Annotated[
        str,
        typer.Option(
            help="Comma-separated layers that get an adapter. Default: the query, key and value projections.",
            rich_help_panel=opt.ADAPTERS,
        ),
    ] = "",
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a full model instead of adapters.", rich_help_panel=opt.ADAPTERS)
    ] = False,
    batch_size: Annotated[
        int, typer.Option(help="Proteins per batch.", min=1, max=MOST, rich_help_panel=opt.OPTIMIZATION)
    ] = 8,
    accumulate: opt.Accumulate = 1,
    steps: opt.Steps = None,
    epochs: opt.Epochs = 3.0,
    learning_rate: opt.LearningRate = 5e-4,
    schedule: opt.Schedule = "linear",
    warmup: opt.Warmup = 0.1,
    weight_decay: opt.WeightDecay = 0.01,
    clip: opt.Clip = 1.0,
    bf16: opt.Bf16 = False,
    gradient_checkpointing: opt.GradientCheckpointing = False,
    metrics: Annotated[
        str,
        typer.Option(
            help="Comma-separated scikit-learn metrics, such as accuracy,roc_auc.", rich_help_panel=opt.SAVING
        ),
    ] = "",
    best: Annotated[str, typer.Option(help="Metric that selects the best epoch.", rich_help_panel=opt.SAVING)] = "loss",
    keep: opt.Keep = 1,
    log_every: opt.LogEvery = 10,
    picture: opt.Picture = None,
    device: opt.Device = None,
    quiet: opt.Quiet = False,
) -> None:
    """Fine-tune a model on labelled proteins: classify or regress whole proteins, or classify each residue.

    Writes a folder with the adapters in PEFT's format or, with --merge or another --train, with the model. Run the same
    command again to resume an interrupted training.

    Example: mlx-esm finetune peptides.csv --model facebook/esm2_t6_8M_UR50D --output my-classifier --merge
    """
    with training(output, quiet) as run:
        from mlx_esm_hf.data.proteins import Report
        from mlx_esm_hf.runs.outputs import check_outputs, check_picture
        from mlx_esm_hf.runtime.device import use_device
        from mlx_esm_hf.training.finetune import finetune

        check_picture(picture)
        check_outputs(None, (), picture)
        use_device(device)
        report = Report()
        finetune(
            table,
            output,
            model,
            task=task,
            train=train,
            validation=validation,
            validation_share=validation_share,
            sequence_column=sequence_column,
            label_column=label_column,
            metrics=opt.parse_list(metrics),
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            target_modules=opt.parse_list(target_modules),
            merge=merge,
            report=report,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            max_steps=steps or -1,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            lr_scheduler_type=schedule,
            warmup_steps=warmup,
            weight_decay=weight_decay,
            max_grad_norm=clip,
            save_total_limit=keep,
            load_best_model_at_end=True,
            metric_for_best_model=best,
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
        print_training_summary(output)
    run.finish(output, report)
