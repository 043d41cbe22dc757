"""Labelled proteins from tables."""

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.tables import read_table


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(esm2_tokenizer())


def write(folder, text, name="table.csv"):
    (folder / name).write_text(text)
    return folder / name


def test_classes_from_csv_tsv_and_parquet(vocabulary, tmp_path):
    rows = [("mkt", "yes"), ("GGAC", "no"), ("AAA", " yes ")]
    text = "".join(f"{sequence},{label}\n" for sequence, label in rows)
    paths = [
        write(tmp_path, "sequence,label\n" + text),
        write(tmp_path, ("sequence,label\n" + text).replace(",", "\t"), "table.tsv"),
        tmp_path / "table.parquet",
    ]
    names, columns = ("sequence", "label"), zip(*rows, strict=True)
    parquet.write_table(pa.table(dict(zip(names, columns, strict=True))), paths[2])
    for path in paths:
        data = read_table(path, "classification", vocabulary, Report())
        assert (data.sequences, data.labels, data.classes) == (["MKT", "GGAC", "AAA"], [1, 0, 1], ["no", "yes"])
        assert data[0] == {"input_ids": [0, 20, 15, 11, 2], "attention_mask": [1] * 5, "labels": 1}
        assert data.lengths.tolist() == [5, 6, 5]


def test_regression_and_other_column_names(vocabulary, tmp_path):
    path = write(tmp_path, "id,protein,tm\na,MKT,61.5\nb,GG,-2e1\n")
    data = read_table(path, "regression", vocabulary, Report(), sequence_column="protein", label_column="tm")
    assert (data.labels, data.classes) == ([61.5, -20.0], [])


def test_a_label_for_each_residue(vocabulary, tmp_path):
    data = read_table(write(tmp_path, "sequence,label\nMKTA,HE-H\nGG,EE\n"), "residues", vocabulary, Report())
    assert (data.classes, data.labels) == (["E", "H"], [[1, 0, -100, 1], [0, 0]])
    assert data[0]["labels"] == [-100, 1, 0, -100, 1, -100]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("classification", "M1T,yes", r"line 3: has '1' at position 2, which is not a residue"),
        ("classification", ",yes", "line 3: is empty"),
        ("classification", "MKT,", "line 3: has no label"),
        ("regression", "MKT,high", "line 3: could not convert string to float: 'high'"),
        ("regression", "MKT,nan", "line 3: has the label 'nan', which is not a finite number"),
        ("residues", "MKT,HE", "line 3: has 3 residues and 2 labels"),
    ],
)
def test_invalid_rows_are_reported(task, row, message, vocabulary, tmp_path):
    good = {"classification": "MKT,no", "regression": "MKT,1", "residues": "MKT,HHH"}[task]
    report = Report()
    path = write(tmp_path, f"sequence,label\n{good}\n{row}\n")
    assert len(read_table(path, task, vocabulary, report)) == 1
    assert len(report.left_out) == 1
    assert f"{path}, {message}" in report.left_out[0]


def test_invalid_tables_are_refused(vocabulary, tmp_path):
    for text, name, message in (
        ("sequence,label\n", "empty.csv", "contains no valid labelled proteins"),
        ("seq,label\nMKT,1\n", "other.csv", "Column 'sequence' not found in .* It has seq, label"),
        ('sequence,label\n"MKT,1\n', "quote.csv", r"quote.csv, line \d: "),
        ("MKT 1\n", "table.txt", "must end in .csv, .tsv or .parquet"),
    ):
        with pytest.raises(ValueError, match=message):
            read_table(write(tmp_path, text, name), "classification", vocabulary, Report())


def test_validation_data_have_the_classes_of_the_training_data(vocabulary, tmp_path):
    path, report = write(tmp_path, "sequence,label\nMKT,b\nGGG,c\n"), Report()
    data = read_table(path, "classification", vocabulary, report, classes=["a", "b"])
    assert (data.labels, data.classes) == ([1], ["a", "b"])
    assert "line 3: has the label 'c', which is not a class of the training data" in report.left_out[0]
