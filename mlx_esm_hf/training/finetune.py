"""A model fitted to labelled proteins: what `mlx-esm finetune` does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.tokenizer import load_tokenizer
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.models.auto import MLXAutoModelForSequenceClassification, MLXAutoModelForTokenClassification
from mlx_esm_hf.training.adapters import LoraConfig, add_adapters, merge_adapters
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.metrics import compute_metrics_for
from mlx_esm_hf.training.run_folder import training_folder
from mlx_esm_hf.training.tables import TASKS, LabelledProteins, read_table
from mlx_esm_hf.training.token_store import held_out
from mlx_esm_hf.training.trainer import MLXTrainer

HOW = ("lora", "dora", "full", "head")
USUAL_METRICS = {
    "single_label_classification": ("accuracy", "matthews_corrcoef"),
    "regression": ("spearman", "root_mean_squared_error"),
}


def finetune(
    table: str | os.PathLike[str],
    output: str | os.PathLike[str],
    model: str,
    *,
    task: str = "classification",
    train: str = "lora",
    validation: str | os.PathLike[str] | None = None,
    validation_share: float = 0.1,
    sequence_column: str = "sequence",
    label_column: str = "label",
    metrics: Sequence[str] = (),
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    merge: bool = False,
    report: Report | None = None,
    **arguments: Any,
) -> dict[str, float]:
    """Fit a model to labelled proteins, and write it for `from_pretrained`, or its adapters in PEFT's layout.

    A training that was stopped goes on when it is called again alike.

    Args:
        table: `.csv`, `.tsv` or `.parquet`; see `read_table`.
        output: a folder that is not there yet, or that of this training.
        model: a Hub repository or a folder.
        task: "classification" or "regression" of whole proteins, or "residues", a class for each residue.
        train: "lora" or "dora" (adapters, and the head), "full" (all), or "head" (all but the trunk's parameters).
        validation: a table to validate with.
        validation_share: without one, the share of the different sequences that is held out.
        metrics: scikit-learn's names, such as "accuracy" or "matthews_corrcoef"; by default those that suit the task.
        rank, alpha, dropout, target_modules: of LoRA and DoRA; by default the projections to query, key and value get
            an adapter.
        merge: write the model with its adapters merged into it instead of the adapters.
        report: takes what was changed and left out of the tables.
        arguments: of `MLXTrainingArguments`.

    Returns:
        The metrics of the validation data.

    Raises:
        ValueError: a table or argument that means nothing, or an output that is something else.
    """
    if train not in HOW:
        raise UserError(f"train={train!r} is not one of {', '.join(HOW)}.")
    if task not in TASKS:
        raise UserError(f"task={task!r} is not one of {', '.join(TASKS)}.")
    report = report or Report()
    with training_folder(output) as goes_on:
        tokenizer = load_tokenizer(model)
        vocabulary = Vocabulary(tokenizer, str(model))
        columns = {"sequence_column": sequence_column, "label_column": label_column}
        data = read_table(table, task, vocabulary, report, **columns)  # type: ignore[arg-type]
        if validation is None:
            data, checked = divide(data, validation_share)
        else:
            checked = read_table(validation, task, vocabulary, report, classes=data.classes, **columns)  # type: ignore
        args = MLXTrainingArguments(output, **{"eval_strategy": "epoch", "save_strategy": "epoch"} | arguments)
        network = load_for(task, model, data.classes, args.seed)
        refuse_long(data, checked, network.max_tokens)
        if train in ("lora", "dora"):
            config = LoraConfig(
                r=rank,
                lora_alpha=alpha,
                lora_dropout=dropout,
                target_modules=list(target_modules or network.adapted),
                modules_to_save=["classifier"],
                use_dora=train == "dora",
                task_type="TOKEN_CLS" if task == "residues" else "SEQ_CLS",
            )
            add_adapters(network, config)
        elif train == "head":
            network.base_model.freeze()
        problem = "regression" if task == "regression" else "single_label_classification"
        collator = DataCollatorForTokenClassification if task == "residues" else DataCollatorWithPadding
        trainer = MLXTrainer(
            network,
            args,
            data_collator=collator(tokenizer, return_tensors="np"),
            train_dataset=data,
            eval_dataset=checked,
            processing_class=tokenizer,
            compute_metrics=compute_metrics_for(problem, metrics or USUAL_METRICS[problem]),
        )
        trainer.train(resume_from_checkpoint=goes_on)
        measured = trainer.evaluate()
        if merge and train in ("lora", "dora"):
            merge_adapters(network)
        trainer.save_model()
    return measured


def load_for(task: str, model: str, classes: Sequence[str], seed: int) -> Any:
    """The model with a new head for these classes, or for a number; equal seeds give equal heads."""
    mx.random.seed(seed)
    if task == "regression":
        return MLXAutoModelForSequenceClassification.from_pretrained(
            model, num_labels=1, problem_type="regression", ignore_mismatched_sizes=True
        )
    cls = MLXAutoModelForTokenClassification if task == "residues" else MLXAutoModelForSequenceClassification
    names = dict(enumerate(classes))
    return cls.from_pretrained(
        model,
        num_labels=len(names),
        id2label=names,
        label2id={name: number for number, name in names.items()},
        ignore_mismatched_sizes=True,
    )


def divide(data: LabelledProteins, share: float) -> tuple[LabelledProteins, LabelledProteins]:
    """Training and validation data, by the sequence: what stands twice in a table is on one side.

    Raises:
        ValueError: one of the two would be empty.
    """
    checked = np.array([held_out(ids.tobytes(), share) for ids in data.ids])
    if checked.all() or not checked.any():
        raise UserError(
            f"Of {len(checked)} proteins a share of {share} leaves nothing to train or to validate with: set another "
            "share, or give a table to validate with."
        )
    return data.part(np.flatnonzero(~checked).tolist()), data.part(np.flatnonzero(checked).tolist())


def refuse_long(data: LabelledProteins, checked: LabelledProteins, most: int | None) -> None:
    """
    Raises:
        ValueError: a protein is longer than the model takes.
    """
    longest = max(data.lengths.max(), checked.lengths.max())
    if most is not None and longest > most:
        raise UserError(
            f"The longest protein has {longest} tokens, the position table of the model ends at {most}: leave such "
            "proteins out, or take ESM-2, which has no such limit."
        )
