"""Labelled proteins from tables: CSV, TSV and Parquet."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.source import check_file
from mlx_esm_hf.data.tables import TEXT, open_table
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.errors import UserError, quoted
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX

TASKS = ("classification", "regression", "residues")
UNLABELLED = "-"  # in per-residue labels
# {task: what a column of labels may contain}
LABEL_TYPES = {
    "classification": (TEXT, "integers", "booleans"),
    "regression": ("integers", "numbers", TEXT),
    "residues": (TEXT,),
}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)
LARGEST = 1e18  # its square, in the loss, must fit into float32
TWO_CLASSES = "Classification needs at least two. Use the task regression for numbers."


class LabelledProteins:
    """A data set of proteins with labels, for `MLXTrainer`.

    Args:
        sequences: cleaned sequences.
        labels: for each protein a class index, a number, or a list with a class index for each residue.
        classes: names of the classes, in the order of their indices; empty for a regression.
        vocabulary: the model's vocabulary.

    Attributes:
        ids: token ids of each sequence, without special tokens.
        lengths: tokens of each protein, special tokens included.
    """

    def __init__(self, sequences: list[str], labels: list[Any], classes: list[str], vocabulary: Vocabulary):
        self.sequences, self.labels, self.classes, self.vocabulary = sequences, labels, classes, vocabulary
        self.ids = [vocabulary.encode(sequence) for sequence in sequences]
        self.lengths = np.array([len(ids) + vocabulary.around for ids in self.ids])

    def subset(self, indices: Sequence[int]) -> LabelledProteins:
        """Return a data set of the proteins with these indices."""
        sequences, labels = ([values[i] for i in indices] for values in (self.sequences, self.labels))
        return LabelledProteins(sequences, labels, self.classes, self.vocabulary)

    @property
    def flat_labels(self) -> np.ndarray:
        """All labels in one array: [proteins], or [residues] if each residue has one."""
        return np.hstack(self.labels)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask`, [tokens], and `labels`: a class, a number, or a class per token."""
        before, after = self.vocabulary.before, self.vocabulary.after
        label = self.labels[index]
        if isinstance(label, list):
            label = [*[IGNORE_INDEX] * len(before), *label, *[IGNORE_INDEX] * len(after)]
        ids = [*before, *self.ids[index].tolist(), *after]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}


def read_table(
    path: str | os.PathLike[str],
    task: str,
    vocabulary: Vocabulary,
    report: Report,
    *,
    sequence_column: str = "sequence",
    label_column: str = "label",
    classes: Sequence[str] | None = None,
) -> LabelledProteins:
    """Read labelled proteins from a table. Invalid rows are skipped and added to the report.

    Args:
        path: a `.csv`, `.tsv` or `.parquet` file with column names.
        task: "classification" (labels are class names), "regression" (numbers), or "residues" (a letter for each
            residue, such as HHEEC; `-` means no label).
        vocabulary: the model's vocabulary.
        report: collects what was changed in the sequences and which rows were skipped.
        sequence_column: the column of the sequences.
        label_column: the column of the labels.
        classes: classes of the training data, when reading validation data. A row with another label is skipped.

    Rows with the same sequence may have different labels.

    Raises:
        UserError: the file cannot be read (see `open_table`), a column has the wrong type, no row is valid, or all
            labels are of one class.
    """
    if task not in TASKS:
        raise UserError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")
    table = open_table(path, sequence=sequence_column, label=label_column)
    _check_type(path, sequence_column, table.types[sequence_column], (TEXT,))
    _check_type(path, label_column, table.types[label_column], LABEL_TYPES[task])
    sequences: list[str] = []
    texts: list[str] = []
    left_out = len(report.left_out)
    for place, row in table.rows:
        try:
            sequences.append(_checked(row[sequence_column], row[label_column], task, vocabulary, report, classes))
            texts.append(row[label_column])
        except UserError as error:
            report.leave_out(f"{place}: {error}.")
    if not sequences:
        messages = report.left_out[left_out:]
        more = [f"and {len(messages) - 10} more."] if len(messages) > 10 else []
        raise UserError("\n".join([f"{path} contains no valid labelled proteins.", *messages[:10], *more]))
    found = sorted(set().union(*(_names(label, task) for label in texts)))
    if task == "residues" and not found:
        raise UserError(f"{path} has no label for any residue: all are {UNLABELLED}.")
    if task != "regression" and not classes and len(found) < 2:
        raise UserError(f"{path} contains only the class {found[0]!r}. {TWO_CLASSES}")
    names = list(classes or found)
    return LabelledProteins(sequences, _labels(texts, task, names), names, vocabulary)


def _check_type(path: str | os.PathLike[str], column: str, kind: str, allowed: Sequence[str]) -> None:
    if kind not in allowed:
        *first, last = allowed
        choices = f"{', '.join(first)} or {last}" if first else last
        raise UserError(f"{path}: column {column!r} must contain {choices}, got {kind}.")


def _checked(
    sequence: str, label: str, task: str, vocabulary: Vocabulary, report: Report, classes: Sequence[str] | None
) -> str:
    """Return the cleaned sequence of a row.

    Raises:
        UserError: the sequence or the label is invalid.
    """
    gaps = report.gaps
    cleaned = vocabulary.alphabet.clean(sequence, False, report)
    length = len(vocabulary.encode(cleaned))
    if not label.strip():
        raise UserError("has no label")
    if task == "residues" and len(label) != length:
        advice = ". Gaps in the sequence have no label" if report.gaps > gaps else ""
        raise UserError(f"has {length} residues and {len(label)} labels{advice}")
    if task == "regression":
        _check_number(label)
    elif unknown := _names(label, task) - set(classes or _names(label, task)):
        raise UserError(f"has the label {min(unknown)!r}, which is not a class of the training data")
    return cleaned


def _check_number(label: str) -> None:
    if not NUMBER.fullmatch(label.strip()):
        raise UserError(f"has the label {quoted(label)}, which is not a number")
    if not np.isfinite(float(label)):
        raise UserError(f"has the label {quoted(label)}, which is not a finite number")
    if abs(float(label)) > LARGEST:
        raise UserError(f"has the label {quoted(label)}, which is too large. Scale the labels")


def _names(label: str, task: str) -> set[str]:
    """Return the classes that a label names."""
    if task == "regression":
        return set()
    return set(label) - {UNLABELLED} if task == "residues" else {label.strip()}


def _labels(texts: list[str], task: str, names: list[str]) -> list[Any]:
    index_of = {name: index for index, name in enumerate(names)}
    if task == "regression":
        return [float(text) for text in texts]
    if task == "residues":
        return [[index_of.get(letter, IGNORE_INDEX) for letter in text] for text in texts]
    return [index_of[text.strip()] for text in texts]


def check_table(path: str | os.PathLike[str], *, sequence_column: str, label_column: str) -> None:
    """Refuse a path that is not a table with these columns, before anything slow.

    Raises:
        ValueError: the file is not found, has another suffix, or lacks a column.
    """
    check_file(path, "a .csv, .tsv or .parquet table")
    open_table(path, sequence=sequence_column, label=label_column)
