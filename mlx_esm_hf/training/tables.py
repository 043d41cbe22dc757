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

    Raises:
        ValueError: the file type is unknown, a column is missing, or no row is valid.
    """
    if task not in TASKS:
        raise UserError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")
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
                raise UserError(f"has the label {label!r}, which is not a finite number")
            known = set(classes or [])
            if classes and task != "regression" and (unknown := _names(label, task) - known):
                raise UserError(f"has the label {min(unknown)!r}, which is not a class of the training data")
        except ValueError as error:
            report.leave_out(f"{place}: {error}.")
            continue
        sequences.append(cleaned)
        texts.append(label)
    if not sequences:
        raise UserError("\n".join([f"{path} contains no valid labelled proteins.", *report.left_out]))
    names = list(classes) if classes else sorted(set().union(*(_names(label, task) for label in texts)))
    return LabelledProteins(sequences, _labels(texts, task, names), names if task != "regression" else [], vocabulary)


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


def _rows(path: str | os.PathLike[str], sequence: str, label: str) -> Iterator[tuple[str, str, str]]:
    """Yield place, sequence and label of each row, as text."""
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
        raise UserError(f"{path}: the file name of a table must end in .csv, .tsv or .parquet.")


def _require(path: str | os.PathLike[str], names: Sequence[str], *wanted: str) -> None:
    for name in wanted:
        if name not in names:
            raise UserError(f"Column {name!r} not found in {path}. It has {', '.join(names)}.")
