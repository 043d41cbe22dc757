"""mlx-esm finetune"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_esm_hf.cli import training_options as options
from mlx_esm_hf.cli.options import Device, Model, Quiet, listed
from mlx_esm_hf.cli.running import running


def command(
    table: Annotated[Path, typer.Argument(help="Labelled proteins: .csv, .tsv or .parquet.")],
    model: Model,
    output: options.Folder,
    task: Annotated[
        str, typer.Option(help="classification, regression, or residues (a letter for each residue, - for none).")
    ] = "classification",
    train: Annotated[str, typer.Option(help="lora, dora, full, or head (the trunk stays as it is).")] = "lora",
    validation: Annotated[Path | None, typer.Option(help="A table to validate with.")] = None,
    validation_share: Annotated[float, typer.Option(help="Without it, the share of the sequences held out.")] = 0.1,
    sequence_column: Annotated[str, typer.Option(help="The column with the proteins.")] = "sequence",
    label_column: Annotated[str, typer.Option(help="The column with the labels.")] = "label",
    metrics: Annotated[str, typer.Option(help="scikit-learn's names, such as accuracy,roc_auc.")] = "",
    rank: Annotated[int, typer.Option(help="Of LoRA's matrices.", min=1)] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA's scale is alpha / rank.")] = 16,
    dropout: Annotated[float, typer.Option(help="Of what goes into LoRA.", min=0, max=1)] = 0.0,
    target_modules: Annotated[
        str, typer.Option(help="Layers that get an adapter, by default the projections to query, key and value.")
    ] = "",
    merge: Annotated[bool, typer.Option("--merge", help="Write a whole model instead of adapters.")] = False,
    batch_size: Annotated[int, typer.Option(help="Proteins to a batch.", min=1)] = 8,
    accumulate: options.Accumulate = 1,
    steps: options.Steps = None,
    epochs: options.Epochs = 3.0,
    learning_rate: options.LearningRate = 5e-4,
    schedule: options.Schedule = "linear",
    warmup: options.Warmup = 0.1,
    weight_decay: options.WeightDecay = 0.01,
    clip: options.Clip = 1.0,
    keep: options.Keep = 1,
    log_every: options.LogEvery = 10,
    best: Annotated[str, typer.Option(help="The metric whose best epoch is taken; loss, if nothing is said.")] = "loss",
    bf16: options.Bf16 = False,
    gradient_checkpointing: options.GradientCheckpointing = False,
    seed: options.Seed = 0,
    picture: options.Picture = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Fit a model to labelled proteins: classes or numbers of whole proteins, or a class of each residue.

    The output is a folder with the adapters in PEFT's layout or, with --merge or another --train, with the model. A
    training that was stopped goes on when the same command is given again.

    Example: mlx-esm finetune peptides.csv --model facebook/esm2_t6_8M_UR50D --output my-classifier --merge
    """
    with running(output, quiet=True) as run:
        from mlx_esm_hf.data.proteins import Report
        from mlx_esm_hf.runtime.device import use_device
        from mlx_esm_hf.training.finetune import finetune
        from mlx_esm_hf.training.picture import check_picture_of, draw_losses

        check_picture_of(picture)
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
            metrics=listed(metrics),
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            target_modules=listed(target_modules),
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
            draw_losses(output, picture)
    if not quiet:
        options.print_summary(output)
    run.finish(output, report)
