"""Fine-tuning on labelled proteins, the job of `mlx-esm finetune`."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_esm_hf.checks import MOST_RANK, check_choice, check_integer, check_number
from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.tokenizer import load_tokenizer
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.demo import shown_name
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.settings import checksum_of_model, content
from mlx_esm_hf.training.tables import TASKS, LabelledProteins, check_table, read_table
from mlx_esm_hf.training.token_store import is_held_out

if TYPE_CHECKING:
    from mlx_esm_hf.models.auto import Checkpoint

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
    check_choice("train", train, METHODS)
    check_choice("task", task, TASKS)
    args = MLXTrainingArguments(output, **{"eval_strategy": "epoch", "save_strategy": "epoch"} | arguments)
    check_integer("rank", rank, 1, MOST_RANK)
    check_number("alpha", alpha)
    check_number("dropout", dropout, 0, below=1)
    columns = {"sequence_column": sequence_column, "label_column": label_column}
    check_table(table, **columns)
    if validation is None:
        check_number("validation_share", validation_share, above=0, below=1)
    else:
        check_table(validation, **columns)

    # These imports take seconds, and torch with them.
    from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

    from mlx_esm_hf.training.adapters import LoraConfig, add_adapters, merge_adapters
    from mlx_esm_hf.training.metrics import compute_metrics_for
    from mlx_esm_hf.training.run_folder import training_folder
    from mlx_esm_hf.training.trainer import MLXTrainer

    problem = "regression" if task == "regression" else "single_label_classification"
    metrics = list(metrics or USUAL_METRICS[problem])
    compute_metrics = compute_metrics_for(problem, metrics)
    check_choice("metric_for_best_model", args.best_metric.removeprefix("eval_"), ["loss", *metrics])
    report = report or Report()
    with training_folder(output) as resumes:
        checkpoint = open_for(task, model)
        tokenizer = load_tokenizer(model, **checkpoint.commit)
        vocabulary = Vocabulary(tokenizer, str(model), checkpoint.config.vocab_size)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=list(target_modules or checkpoint.model_class.adapted),
            modules_to_save=["classifier"],
            use_dora=train == "dora",
            task_type="TOKEN_CLS" if task == "residues" else "SEQ_CLS",
        )
        if train in ("lora", "dora"):
            add_adapters(checkpoint.skeleton(), config)  # refuses unknown layers before the weights are loaded
        data = read_table(table, task, vocabulary, report, **columns)
        if validation is None:
            data, held_out = split_by_sequence(data, validation_share)
        else:
            held_out = read_table(validation, task, vocabulary, report, classes=data.classes, **columns)
        check_labels(data, held_out, compute_metrics)
        check_lengths(data, held_out, checkpoint.max_tokens)
        network = load_model_for(task, model, data.classes, args.seed, **checkpoint.commit)
        settings = {
            "training data": content(os.path.basename(table), checksum_of_proteins(data)),
            "validation data": content(os.path.basename(validation or table), checksum_of_proteins(held_out)),
            "model": content(shown_name(model), checksum_of_model(network)),
            "task": task,
            "train": train,
            "merge": merge,
            "validation_share": None if validation is not None else validation_share,
            "sequence_column": sequence_column,
            "label_column": label_column,
            "metrics": metrics,
        }
        if train in ("lora", "dora"):
            add_adapters(network, config)
        elif train == "head":
            network.base_model.freeze()
        collator = DataCollatorForTokenClassification if task == "residues" else DataCollatorWithPadding
        trainer = MLXTrainer(
            network,
            args,
            data_collator=collator(tokenizer, return_tensors="np"),
            train_dataset=data,
            eval_dataset=held_out,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
        )
        trainer.settings = settings
        trainer.train(resume_from_checkpoint=resumes)
        results = trainer.evaluate()
        if merge and train in ("lora", "dora"):
            merge_adapters(network)
        trainer.save_model()
    return results


def open_for(task: str, model: str) -> Checkpoint:
    """Read and check the config of a model to fine-tune, but not its weights."""
    from mlx_esm_hf.models import auto

    cls = auto.MLXAutoModelForTokenClassification if task == "residues" else auto.MLXAutoModelForSequenceClassification
    return auto.open_checkpoint(cls, model)


def load_model_for(task: str, model: str, classes: Sequence[str], seed: int, **commit: str) -> Any:
    """Load a model with a new head for these classes, or for a number. Equal seeds give equal heads."""
    from mlx_esm_hf.models.auto import MLXAutoModelForSequenceClassification, MLXAutoModelForTokenClassification

    mx.random.seed(seed)
    if task == "regression":
        return MLXAutoModelForSequenceClassification.from_pretrained(
            model, num_labels=1, problem_type="regression", ignore_mismatched_sizes=True, report=False, **commit
        )
    cls = MLXAutoModelForTokenClassification if task == "residues" else MLXAutoModelForSequenceClassification
    names = dict(enumerate(classes))
    return cls.from_pretrained(
        model,
        num_labels=len(names),
        id2label=names,
        label2id={name: index for index, name in names.items()},
        ignore_mismatched_sizes=True,
        report=False,  # it would list the parameters of the new head
        **commit,
    )


def checksum_of_proteins(data: LabelledProteins) -> str:
    """Return a checksum of labelled proteins: of their token ids, labels and classes, in their order."""
    digest = hashlib.sha256(json.dumps(data.classes).encode())
    for ids, label in zip(data.ids, data.labels, strict=True):
        digest.update(f"{len(ids)} {json.dumps(label)};".encode() + ids.tobytes())
    return digest.hexdigest()


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


def check_labels(
    data: LabelledProteins, held_out: LabelledProteins, compute_metrics: Callable[[Any], dict[str, float]]
) -> None:
    """Check that the training data have two classes and that the metrics are defined for the validation data.

    Raises:
        UserError: they are not.
    """
    present = set(data.flat_labels.tolist()) - {IGNORE_INDEX}
    if data.classes and len(present) < 2:
        only = f"only the class {data.classes[present.pop()]!r}" if present else "no labels"
        raise UserError(
            f"After the split, the training part contains {only}: set another validation share, or provide a "
            "validation table."
        )
    labels = held_out.flat_labels
    guesses = np.arange(len(labels))[:, None] * np.ones(max(1, len(data.classes)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compute_metrics(SimpleNamespace(predictions=guesses, label_ids=labels))
    except UserError as error:
        raise UserError(
            f"The validation data do not suit the metrics: {error} Or set another validation share, or provide another "
            "validation table."
        ) from None


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
