"""Tables that cannot be read: one message with the file, the line or column, and what to do."""

import gzip

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from mlx_esm_hf.data import mutations
from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.tables import open_table
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.tables import read_table

GOOD = "name,label\nM1A,1\n"
BAD = {
    "latin-1": (b"name,label\nM1A,1\nM1C,\xe9\n", "line 3: not UTF-8 (byte 0xE9). Save the table as UTF-8"),
    "latin-1 in the header": (b"name,label,\xb5\nM1A,1,2\n", "line 1: not UTF-8 (byte 0xB5). Save the table as UTF-8"),
    "utf-16 with a mark": (GOOD.encode("utf-16"), "UTF-16. Save the table as UTF-8"),
    "big-endian utf-16": (b"\xfe\xff" + GOOD.encode("utf-16-be"), "UTF-16. Save the table as UTF-8"),
    "utf-16 without a mark": (GOOD.encode("utf-16-le"), "UTF-16. Save the table as UTF-8"),
    "big-endian without a mark": (GOOD.encode("utf-16-be"), "UTF-16. Save the table as UTF-8"),
    "utf-32": (GOOD.encode("utf-32"), "UTF-"),
    "NUL": (b"name,label\nM1A,1\nM1C,\x00\n", "line 3: contains a NUL byte. Remove it"),
    "NUL in the header": (b"na\x00me,label\nM1A,1\n", "line 1: contains a NUL byte. Remove it"),
    "gzip": (gzip.compress(GOOD.encode()), "compressed with gzip. Decompress it first"),
    "zstandard": (b"\x28\xb5\x2f\xfd....", "compressed with zstandard. Decompress it first"),
    "workbook": (b"PK\x03\x04....", "a zip archive or an Excel workbook. Save the table as CSV"),
    "parquet": (b"PAR1....PAR1", "a Parquet file, not CSV. Rename it"),
    "open quote in the header": (b'name,"label\nM1A,1\n', 'line 1: a quote (") is not closed'),
    "text after a quote in the header": (b'"name"x,label\nM1A,1\n', "line 1: ',' expected after '\"'"),
    "open quote": (b'name,label\nM1A,1\n"M1C,2\nM1D,3\n', 'line 3: a quote (") is not closed'),
    "text after a quote": (b'name,label\nM1A,1\n"M1C"x,2\n', "line 3: ',' expected after '\"'"),
    "huge field": (b"name,label\nM1A," + b"x" * 140_000 + b"\n", "line 2: a value has more than 131,072 characters"),
    "huge field in the header": (
        b"name,label" + b"x" * 140_000 + b"\nM1A,1\n",
        "line 1: a value has more than 131,072",
    ),
    "two columns": (b"name,label,name\nM1A,1,2\n", ": two columns are named 'name'. Rename one"),
    "no column": (b"sequence,y\nM1A,1\n", "No column 'name' in {} (columns: sequence, y). Pass `--name-column NAME`."),
    "one column": (b"label\n1\n", "No column 'name' in {} (columns: label). Pass `--name-column label`."),
    "semicolons": (b"name;label\nM1A;1\n", "Values must be separated by ','"),
    "tabs": (b"name\tlabel\nM1A\t1\n", "Values must be separated by ','"),
    "too few values": (b"name,label\nM1A,1\nM1C\n", "line 3: expected 2 columns, got 1"),
    "too many values": (b"name,label\nM1A,1\nM1C,1,2\n", "line 3: expected 2 columns, got 3"),
    "empty": (b"", "No column 'name' in {}: its first line is empty"),
    "mark only": (b"\xef\xbb\xbf", "No column 'name' in {}: its first line is empty"),
    "empty first line": (b"\nname,label\nM1A,1\n", "No column 'name' in {}: its first line is empty"),
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_tables_are_refused(problem, tmp_path):
    data, message = BAD[problem]
    path = tmp_path / "table.csv"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        list(open_table(path, name="name").rows)
    assert message.format(path) in str(error.value) and str(path) in str(error.value)
    with pytest.raises(UserError, match="table.csv"):
        mutations.read_table(path, "name")
    columns = {"sequence_column": "name", "label_column": "label"}
    with pytest.raises(UserError, match="table.csv"):
        read_table(path, "classification", Vocabulary(esm2_tokenizer()), Report(), **columns)


@pytest.mark.parametrize("suffix", [".txt", ".gz", "", ".xlsx"])
def test_other_suffixes_are_refused(suffix, tmp_path):
    path = tmp_path / f"table{suffix}"
    path.write_text(GOOD)
    with pytest.raises(UserError, match="Use .csv, .tsv or .parquet"):
        open_table(path, name="name")


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffname,label\nM,1\nK,2\n",
        "name,label\r\nM,1\r\nK,2\r\n",
        "name,label\rM,1\rK,2\r",
        "name,label\nM,1\n\n  \nK,2",
        '"name","label"\n"M","1"\nK,2\n\n',
        "label,name\n1,M\n2,K\n",
        "name,,label,\nM,x,1,y\nK,,2,\n",
        "name\tlabel\nM\t1\nK\t2\n",
    ],
)
def test_good_tables(text, tmp_path):
    path = tmp_path / ("table.tsv" if "\t" in text else "table.csv")
    path.write_text(text, encoding="utf-8", newline="")
    rows = [(row["name"], row["label"]) for _, row in open_table(path, name="name", label="label").rows]
    assert rows == [("M", "1"), ("K", "2")]


def test_lines_are_those_where_rows_begin(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('name,label\n"a\nb",1\n\nc,2\n')
    assert [place for place, _ in open_table(path, name="name").rows] == [f"{path}, line 2", f"{path}, line 5"]


def write_parquet(path, **columns):
    parquet.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("damage", ["empty", "fake", "truncated", "page", "csv"])
def test_bad_parquet_is_refused(damage, tmp_path):
    path = write_parquet(tmp_path / "t.parquet", name=["MKT"] * 2000, label=[str(i) for i in range(2000)])
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "fake": b"PAR1" + bytes(100) + b"PAR1",
            "truncated": data[: len(data) // 2],
            "page": data[:4] + bytes(len(data) - 700) + data[-696:],
            "csv": GOOD.encode(),
        }[damage]
    )
    with pytest.raises(UserError, match="t.parquet is not a Parquet file, or it is damaged"):
        list(open_table(path, name="name", label="label").rows)


def test_parquet_columns(tmp_path):
    path = tmp_path / "t.parquet"
    table = pa.Table.from_arrays([pa.array(["M"]), pa.array(["a"]), pa.array(["b"])], ["name", "label", "label"])
    parquet.write_table(table, path)
    with pytest.raises(UserError, match=r"t.parquet: two columns are named 'label'. Rename one"):
        open_table(path, name="name", label="label")
    with pytest.raises(
        UserError, match=r"No column 'x' in .* \(columns: name, label, label\). Pass `--name-column NAME`"
    ):
        open_table(path, name="x")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array([["M"]]), "list"),
        (pa.array([{"a": "M"}]), "struct"),
        (pa.array([b"M"]), "binary"),
        (pa.array([1.5]), "numbers"),
        (pa.array([7]), "integers"),
    ],
)
def test_parquet_with_other_types(values, kind, tmp_path):
    path = write_parquet(tmp_path / "t.parquet", name=values, label=pa.array(["1"]))
    with pytest.raises(UserError, match=f"t.parquet: column 'name' must contain text, got {kind}"):
        read_table(path, "residues", Vocabulary(esm2_tokenizer()), Report(), sequence_column="name")


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["M", None]),
        pa.array(["M", None], pa.large_string()),
        pa.array(["M", None]).dictionary_encode(),
        pa.array(["M", None], pa.string_view()),
    ],
)
def test_parquet_with_text(values, tmp_path):
    path = write_parquet(tmp_path / "t.parquet", name=values)
    rows = [(place, row["name"]) for place, row in open_table(path, name="name").rows]
    assert rows == [(f"{path}, row 1", "M"), (f"{path}, row 2", "")]
