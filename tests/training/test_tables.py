"""Labelled proteins from tables."""

from contextlib import nullcontext
from decimal import Decimal

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
        ("classification", "M1T,yes", r"line 4: has '1' at position 2, which is not a residue"),
        ("classification", ",yes", "line 4: is empty"),
        ("classification", "MKT,", "line 4: has no label"),
        ("regression", "MKT,high", "line 4: has the label 'high', which is not a number"),
        ("regression", "MKT,1_000", "line 4: has the label '1_000', which is not a number"),
        ("regression", 'MKT,"1,5"', "line 4: has the label '1,5', which is not a number"),
        ("regression", "MKT,١", "line 4: has the label '١', which is not a number"),
        ("regression", "MKT,-inf", "line 4: has the label '-inf', which is not a finite number"),
        ("regression", "MKT,1e999", "line 4: has the label '1e999', which is not a finite number"),
        ("regression", "MKT,1e30", "line 4: has the label '1e30', which is too large. Scale the labels"),
        ("regression", "MKT,  ", "line 4: has no label"),
        ("regression", "MKT,nan", "line 4: has the label 'nan', which is not a finite number"),
        ("residues", "MKT,HE", "line 4: has 3 residues and 2 labels"),
        ("residues", "MKT,HEEC", "line 4: has 3 residues and 4 labels"),
        ("residues", "MK-T,HEEC", "line 4: has 3 residues and 4 labels. Gaps in the sequence have no label"),
    ],
)
def test_invalid_rows_are_reported(task, row, message, vocabulary, tmp_path):
    good = {"classification": "MKT,no\nGG,yes", "regression": "MKT,1\nGG,2", "residues": "MKT,HHH\nGG,EE"}[task]
    report = Report()
    path = write(tmp_path, f"sequence,label\n{good}\n{row}\n")
    assert len(read_table(path, task, vocabulary, report)) == 2
    assert len(report.left_out) == 1
    assert f"{path}, {message}" in report.left_out[0]


def test_invalid_tables_are_refused(vocabulary, tmp_path):
    for text, name, message in (
        ("sequence,label\n", "empty.csv", "contains no valid labelled proteins"),
        (
            "seq,label\nMKT,1\n",
            "other.csv",
            r"No column 'sequence' in .*other.csv \(columns: seq, label\). Pass `--sequence-column NAME`",
        ),
        ('sequence,label\n"MKT,1\n', "quote.csv", r"quote.csv, line \d: "),
        ("MKT 1\n", "table.txt", "Use .csv, .tsv or .parquet"),
    ):
        with pytest.raises(ValueError, match=message):
            read_table(write(tmp_path, text, name), "classification", vocabulary, Report())


def test_validation_data_have_the_classes_of_the_training_data(vocabulary, tmp_path):
    path, report = write(tmp_path, "sequence,label\nMKT,b\nGGG,c\n"), Report()
    data = read_table(path, "classification", vocabulary, report, classes=["a", "b"])
    assert (data.labels, data.classes) == ([1], ["a", "b"])
    assert "line 3: has the label 'c', which is not a class of the training data" in report.left_out[0]


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("classification", "MKT,a\nGG,a\n", "contains only the class 'a'. Classification needs at least two"),
        ("residues", "MKT,HHH\nGG,H-\n", "contains only the class 'H'. Classification needs at least two"),
        ("residues", "MKT,---\nGG,--\n", "has no label for any residue: all are -"),
    ],
)
def test_one_class_is_refused(task, rows, message, vocabulary, tmp_path):
    path = write(tmp_path, f"sequence,label\n{rows}")
    with pytest.raises(ValueError, match=f"table.csv {message}"):
        read_table(path, task, vocabulary, Report())
    validation = write(tmp_path, f"sequence,label\n{rows}", "validation.csv")
    if "-" in rows and task == "residues":
        with pytest.raises(ValueError, match="validation.csv") if "all are" in message else nullcontext():
            read_table(validation, task, vocabulary, Report(), classes=["E", "H"])
    else:
        assert len(read_table(validation, task, vocabulary, Report(), classes=["a", "b", "H"])) == 2


def test_message_lists_only_ten_rows_of_its_own_table(vocabulary, tmp_path):
    report = Report(left_out=["a row of another table"])
    path = write(tmp_path, "sequence,label\n" + "M1T,a\n" * 1000)
    with pytest.raises(ValueError, match="(?s)line 11: .*and 990 more") as error:
        read_table(path, "classification", vocabulary, report)
    assert "another table" not in str(error.value) and len(str(error.value).splitlines()) == 12


@pytest.mark.parametrize(
    ("values", "task", "labels"),
    [
        (pa.array([3, 7]), "classification", [0, 1]),
        (pa.array([True, False]), "classification", [1, 0]),
        (pa.array(["a", "b"]).dictionary_encode(), "classification", [0, 1]),
        (pa.array([3, 7]), "regression", [3.0, 7.0]),
        (pa.array([3.5, 7], pa.float32()), "regression", [3.5, 7.0]),
        (pa.array([Decimal("3.5"), Decimal("7.0")]), "regression", [3.5, 7.0]),
        (pa.array(["3.5", "7"]), "regression", [3.5, 7.0]),
    ],
)
def test_labels_of_parquet(values, task, labels, vocabulary, tmp_path):
    parquet.write_table(pa.table({"sequence": ["MKT", "GG"], "label": values}), tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet", task, vocabulary, Report()).labels == labels


@pytest.mark.parametrize(
    ("values", "task", "message"),
    [
        (pa.array([1.5, 2.5]), "classification", "column 'label' must contain text, integers or booleans, got numbers"),
        (pa.array([[1], [2]]), "classification", "column 'label' must contain text, integers or booleans, got list"),
        (
            pa.array([b"a", b"b"]),
            "classification",
            "column 'label' must contain text, integers or booleans, got binary",
        ),
        (pa.array([True, False]), "regression", "column 'label' must contain integers, numbers or text, got booleans"),
        (pa.array([{"a": 1}, None]), "regression", "column 'label' must contain integers, numbers or text, got struct"),
        (pa.array([1, 2]), "residues", "column 'label' must contain text, got integers"),
    ],
)
def test_other_types_of_labels_are_refused(values, task, message, vocabulary, tmp_path):
    parquet.write_table(pa.table({"sequence": ["MKT", "GG"], "label": values}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=f"t.parquet: {message}"):
        read_table(tmp_path / "t.parquet", task, vocabulary, Report())


def test_missing_values_of_parquet_are_left_out(vocabulary, tmp_path):
    columns = {"sequence": ["MKT", None, "GG", "AA", "CC"], "label": [1.5, 2.0, None, float("nan"), float("inf")]}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    report = Report()
    assert read_table(tmp_path / "t.parquet", "regression", vocabulary, report).labels == [1.5]
    reasons = ["row 2: is empty", "row 3: has no label", "row 4: has the label 'nan'", "row 5: has the label 'inf'"]
    for message, reason in zip(report.left_out, reasons, strict=True):
        assert reason in message


def test_one_sequence_may_have_different_labels(vocabulary, tmp_path):
    path = write(tmp_path, "sequence,label\nMKT,a\nMKT,b\n")
    assert read_table(path, "classification", vocabulary, Report()).labels == [0, 1]
