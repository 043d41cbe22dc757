import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.finetune import divide
from mlx_esm_hf.training.tables import read_table


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(esm2_tokenizer())


def written(folder, text, name="table.csv"):
    (folder / name).write_text(text)
    return folder / name


def test_classes_from_csv_tsv_and_parquet(vocabulary, tmp_path):
    rows = [("mkt", "yes"), ("GGAC", "no"), ("AAA", " yes ")]
    text = "".join(f"{sequence},{label}\n" for sequence, label in rows)
    paths = [
        written(tmp_path, "sequence,label\n" + text),
        written(tmp_path, ("sequence,label\n" + text).replace(",", "\t"), "table.tsv"),
        tmp_path / "table.parquet",
    ]
    names, columns = ("sequence", "label"), zip(*rows, strict=True)
    parquet.write_table(pa.table(dict(zip(names, columns, strict=True))), paths[2])
    for path in paths:
        data = read_table(path, "classification", vocabulary, Report())
        assert (data.sequences, data.labels, data.classes) == (["MKT", "GGAC", "AAA"], [1, 0, 1], ["no", "yes"])
        assert data[0] == {"input_ids": [0, 20, 15, 11, 2], "attention_mask": [1] * 5, "labels": 1}
        assert data.lengths.tolist() == [5, 6, 5]


def test_numbers_and_other_columns(vocabulary, tmp_path):
    path = written(tmp_path, "id,protein,tm\na,MKT,61.5\nb,GG,-2e1\n")
    data = read_table(path, "regression", vocabulary, Report(), sequence_column="protein", label_column="tm")
    assert (data.labels, data.classes) == ([61.5, -20.0], [])


def test_a_label_for_each_residue(vocabulary, tmp_path):
    data = read_table(written(tmp_path, "sequence,label\nMKTA,HE-H\nGG,EE\n"), "residues", vocabulary, Report())
    assert (data.classes, data.labels) == (["E", "H"], [[1, 0, -100, 1], [0, 0]])
    assert data[0]["labels"] == [-100, 1, 0, -100, 1, -100]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("classification", "M1T,yes", r"line 3: has '1' at position 2, which is not a residue"),
        ("classification", ",yes", "line 3: is empty"),
        ("classification", "MKT,", "line 3: has no label"),
        ("regression", "MKT,high", "line 3: could not convert string to float: 'high'"),
        ("regression", "MKT,nan", "line 3: has the label 'nan', which is no number"),
        ("residues", "MKT,HE", "line 3: has 3 residues and 2 labels"),
    ],
)
def test_rows_that_cannot_be_used_are_named(task, row, message, vocabulary, tmp_path):
    good = {"classification": "MKT,no", "regression": "MKT,1", "residues": "MKT,HHH"}[task]
    report = Report()
    path = written(tmp_path, f"sequence,label\n{good}\n{row}\n")
    assert len(read_table(path, task, vocabulary, report)) == 1
    assert len(report.left_out) == 1
    assert f"{path}, {message}" in report.left_out[0]


def test_tables_that_cannot_be_read(vocabulary, tmp_path):
    for text, name, message in (
        ("sequence,label\n", "empty.csv", "holds no labelled proteins"),
        ("seq,label\nMKT,1\n", "other.csv", "has no column 'sequence'; it has seq, label"),
        ('sequence,label\n"MKT,1\n', "quote.csv", r"quote.csv, line \d: "),
        ("MKT 1\n", "table.txt", "suffixes .csv, .tsv and .parquet"),
    ):
        with pytest.raises(ValueError, match=message):
            read_table(written(tmp_path, text, name), "classification", vocabulary, Report())


def test_validation_has_the_classes_of_the_training(vocabulary, tmp_path):
    path, report = written(tmp_path, "sequence,label\nMKT,b\nGGG,c\n"), Report()
    data = read_table(path, "classification", vocabulary, report, classes=["a", "b"])
    assert (data.labels, data.classes) == ([1], ["a", "b"])
    assert "line 3: has the label 'c', which the training data has not" in report.left_out[0]


def test_equal_sequences_are_on_one_side(vocabulary, tmp_path):
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACDEFGHIKL"), 12)) for _ in range(200)] * 2
    text = "".join(f"{sequence},{number % 3}\n" for number, sequence in enumerate(sequences))
    data = read_table(written(tmp_path, "sequence,label\n" + text), "classification", vocabulary, Report())
    training, checked = divide(data, 0.2)
    assert len(training) + len(checked) == 400
    assert not set(training.sequences) & set(checked.sequences)
    with pytest.raises(ValueError, match="leaves nothing to train or to validate with"):
        divide(data.part([0, 1]), 0.0)
