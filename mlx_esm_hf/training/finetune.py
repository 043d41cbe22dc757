"""Fine-tuning on labelled proteins, the job of `mlx-esm finetune`."""

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
from mlx_esm_hf.training.token_store import is_held_out
from mlx_esm_hf.training.trainer import MLXTrainer

METHODS = ("lora", "dora", "full", "head")
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
    """Fine-tune a model on labelled proteins and write it for `from_pretrained`, or its adapters in PEFT's layout.

    Calling it again with the same arguments resumes an interrupted run.

    Args:
        table: a `.csv`, `.tsv` or `.parquet` file; see `read_table`.
        output: a new folder, or the folder of an interrupted run.
        model: a Hub repository or a folder.
        task: "classification" or "regression" of whole proteins, or "residues" for a class for each residue.
        train: what to train: "lora" or "dora" (adapters and head), "full" (everything) or "head" (the head only).
        validation: a table of validation data.
        validation_share: without `validation`, the fraction of the distinct sequences to hold out.
        sequence_column: the column of the sequences.
        label_column: the column of the labels.
        metrics: scikit-learn's names, such as "accuracy" or "matthews_corrcoef"; by default those that suit the task.
        rank: `r` of the adapters.
        alpha: `lora_alpha` of the adapters.
        dropout: `lora_dropout` of the adapters.
        target_modules: the layers to adapt; by default the query, key and value projections.
        merge: write the model with merged adapters instead of the adapters.
        report: collects what was changed in the tables and which rows were skipped.
        arguments: arguments of `MLXTrainingArguments`.

    Returns:
        The metrics on the validation data.

    Raises:
        ValueError: a table or an argument is invalid, or the output folder contains something else.
    """
    if train not in METHODS:
        raise UserError(f"train must be one of {', '.join(METHODS)}, got {train!r}.")
    if task not in TASKS:
        raise UserError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")
    report = report or Report()
    with training_folder(output) as resumes:
        tokenizer = load_tokenizer(model)
        vocabulary = Vocabulary(tokenizer, str(model))
        columns = {"sequence_column": sequence_column, "label_column": label_column}
        data = read_table(table, task, vocabulary, report, **columns)
        if validation is None:
            data, held_out = split_by_sequence(data, validation_share)
        else:
            held_out = read_table(validation, task, vocabulary, report, classes=data.classes, **columns)
        args = MLXTrainingArguments(output, **{"eval_strategy": "epoch", "save_strategy": "epoch"} | arguments)
        network = load_model_for(task, model, data.classes, args.seed)
        check_lengths(data, held_out, network.max_tokens)
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
            eval_dataset=held_out,
            processing_class=tokenizer,
            compute_metrics=compute_metrics_for(problem, metrics or USUAL_METRICS[problem]),
        )
        trainer.train(resume_from_checkpoint=resumes)
        results = trainer.evaluate()
        if merge and train in ("lora", "dora"):
            merge_adapters(network)
        trainer.save_model()
    return results


def load_model_for(task: str, model: str, classes: Sequence[str], seed: int) -> Any:
    """Load a model with a new head for these classes, or for a number. Equal seeds give equal heads."""
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
        label2id={name: index for index, name in names.items()},
        ignore_mismatched_sizes=True,
    )


def split_by_sequence(data: LabelledProteins, share: float) -> tuple[LabelledProteins, LabelledProteins]:
    """Return training and validation data. All rows with the same sequence are on the same side.

    Args:
        data: the rows of a table.
        share: fraction of the distinct sequences to validate with.

    Raises:
        ValueError: one of the two would be empty.
    """
    held_out = np.array([is_held_out(ids.tobytes(), share) for ids in data.ids])
    if held_out.all() or not held_out.any():
        raise UserError(
            f"With a validation share of {share}, {len(held_out)} proteins leave no training or no validation data: "
            "set another share, or provide a validation table."
        )
    return data.subset(np.flatnonzero(~held_out).tolist()), data.subset(np.flatnonzero(held_out).tolist())


def check_lengths(data: LabelledProteins, held_out: LabelledProteins, max_tokens: int | None) -> None:
    """Check that all proteins fit into the model's position table.

    Raises:
        ValueError: a protein is longer.
    """
    longest = max(data.lengths.max(), held_out.lengths.max())
    if max_tokens is not None and longest > max_tokens:
        raise UserError(
            f"The longest protein has {longest} tokens, but the model accepts at most {max_tokens}: remove such "
            "proteins, or use ESM-2, which has no such limit."
        )
