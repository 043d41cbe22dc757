"""Labelled proteins from tables: CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_esm_hf.data.proteins import Report, clean
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX

TASKS = ("classification", "regression", "residues")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
UNLABELLED = "-"  # in per-residue labels


class LabelledProteins:
    """A data set of proteins with labels, as `MLXTrainer` takes it.

    Attributes:
        sequences: cleaned.
        classes: their names, in the order of their numbers; empty for a regression.
        lengths: tokens of each.
    """

    def __init__(self, sequences: list[str], labels: list[Any], classes: list[str], vocabulary: Vocabulary):
        self.sequences, self.labels, self.classes, self.vocabulary = sequences, labels, classes, vocabulary
        self.ids = [vocabulary.encode(sequence) for sequence in sequences]
        self.lengths = np.array([len(ids) + vocabulary.around for ids in self.ids])

    def part(self, numbers: Sequence[int]) -> LabelledProteins:
        """Those of these numbers."""
        sequences, labels = ([values[i] for i in numbers] for values in (self.sequences, self.labels))
        return LabelledProteins(sequences, labels, self.classes, self.vocabulary)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """`input_ids` and `attention_mask` [tokens], and `labels`: a class, a number, or a class for each token."""
        before, after = self.vocabulary.before, self.vocabulary.after
        label = self.labels[number]
        if isinstance(label, list):
            label = [*[IGNORE_INDEX] * len(before), *label, *[IGNORE_INDEX] * len(after)]
        ids = [*before, *self.ids[number].tolist(), *after]
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
    """The labelled proteins of a table; rows that cannot be used are left to the report.

    Args:
        path: `.csv`, `.tsv` or `.parquet`, with a line of names.
        task: "classification" (labels are names of classes), "regression" (numbers), or "residues" (a letter for each
            residue, such as HHEEC; `-` has no label).
        classes: those of the training, for another table; a label that is none of them is an error.

    Raises:
        ValueError: a table of another kind, without these columns, or without a row that can be used.
    """
    if task not in TASKS:
        raise UserError(f"task={task!r} is not one of {', '.join(TASKS)}.")
    sequences: list[str] = []
    texts: list[str] = []
    for place, sequence, label in _rows(path, sequence_column, label_column):
        try:
            cleaned = clean(sequence, report=report)
            length = len(vocabulary.encode(cleaned))
            if not label.strip():
                raise UserError("has no label")
            if task == "residues" and len(label) != length:
                raise UserError(f"has {length} residues and {len(label)} labels")
            if task == "regression" and not np.isfinite(float(label)):
                raise UserError(f"has the label {label!r}, which is no number")
            known = set(classes or [])
            if classes and task != "regression" and (unknown := _names(label, task) - known):
                raise UserError(f"has the label {min(unknown)!r}, which the training data has not")
        except ValueError as error:
            report.leave_out(f"{place}: {error}.")
            continue
        sequences.append(cleaned)
        texts.append(label)
    if not sequences:
        raise UserError("\n".join([f"{path} holds no labelled proteins.", *report.left_out]))
    names = list(classes) if classes else sorted(set().union(*(_names(label, task) for label in texts)))
    return LabelledProteins(sequences, _labels(texts, task, names), names if task != "regression" else [], vocabulary)


def _names(label: str, task: str) -> set[str]:
    """The classes that a label names."""
    if task == "regression":
        return set()
    return set(label) - {UNLABELLED} if task == "residues" else {label.strip()}


def _labels(texts: list[str], task: str, names: list[str]) -> list[Any]:
    numbers = {name: number for number, name in enumerate(names)}
    if task == "regression":
        return [float(text) for text in texts]
    if task == "residues":
        return [[numbers.get(letter, IGNORE_INDEX) for letter in text] for text in texts]
    return [numbers[text.strip()] for text in texts]


def _rows(path: str | os.PathLike[str], sequence: str, label: str) -> Iterator[tuple[str, str, str]]:
    """Place, sequence and label of each row, as text."""
    suffix = Path(path).suffix
    if suffix == ".parquet":
        import pyarrow.parquet as parquet

        names, table = parquet.read_schema(path).names, None
        _require(path, names, sequence, label)
        table = parquet.read_table(path, columns=list(dict.fromkeys([sequence, label])))
        for number, row in enumerate(table.to_pylist(), 1):
            texts = ("" if row[name] is None else str(row[name]) for name in (sequence, label))
            yield (f"{path}, row {number}", *texts)  # type: ignore[misc]
    elif suffix in DELIMITERS:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=DELIMITERS[suffix], strict=True)
            _require(path, reader.fieldnames or [], sequence, label)
            try:
                for row in reader:
                    yield f"{path}, line {reader.line_num}", row[sequence] or "", row[label] or ""
            except csv.Error as error:
                raise UserError(f"{path}, line {reader.line_num}: {error}.") from error
    else:
        raise UserError(f"{path}: tables are told by the suffixes .csv, .tsv and .parquet.")


def _require(path: str | os.PathLike[str], names: Sequence[str], *wanted: str) -> None:
    for name in wanted:
        if name not in names:
            raise UserError(f"{path} has no column {name!r}; it has {', '.join(names)}.")
