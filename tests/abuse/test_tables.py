"""Generated tables for `finetune` and `score`, and generated ids for every format.

A table is refused with its name, or it is read as an independent reader reads it: Python's csv module or pyarrow.
Every format gives back the ids in order, with their arrays.
"""

import csv
import io
import math
import string
from collections import Counter
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlx_esm_hf import embed, read_proteins
from mlx_esm_hf.data import mutations
from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.runs.ids import UniqueIds
from mlx_esm_hf.training.tables import TASKS, read_table
from tests.jobs.models import write_model
from tests.runs import results

EXAMPLES = 2000
campaign = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))

SEQUENCES = st.text("ACDEFGHIKLMNPQRSTVWY", min_size=1, max_size=8) | st.sampled_from(
    ["", " ", "mkt", "MK-T", "MKT*", "M*K", "MJB", "M1", "<mask>", "MK|T", "é", "M,K", 'M"K', "M\nK", "\u2028"]
)
LABELS = st.sampled_from(
    ["a", "b", " a ", "1", "2", "0.5", "-1e3", "1e999", "1e30", "nan", "inf", "1_0", "١", "1,5", "", " ", "é", "HHE",
     "---", "H", "E", "HE", "=1", '"', "a\nb", "NA", "True"]
) | st.text("HE-", min_size=1, max_size=8)  # fmt: skip
HEADERS = [["sequence", "label"]] * 30 + [
    ["label", "sequence"], ["id", "sequence", "", "label", ""], ["sequence", "label", "label"], ["sequence"], [],
    ["Sequence", "label"], [" sequence", "label"], ["sequence", "y"], ["séquence", "label", "sequence"],
]  # fmt: skip
ENCODINGS = ["utf-8"] * 30 + ["utf-8-sig", "latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]


@st.composite
def text_tables(draw, cells):
    """Draw the bytes of a table, with the damage that editors and scripts do."""
    header = draw(st.sampled_from(HEADERS))
    rows = [[draw(cells[name]) if name in cells else "x" for name in header] for _ in range(draw(st.integers(0, 8)))]
    if rows and draw(st.integers(0, 9)) == 0:
        rows[-1] = draw(st.sampled_from([rows[-1][:-1], [*rows[-1], "more"], [], [" "]]))
    text = io.StringIO()
    style = {
        "lineterminator": draw(st.sampled_from(["\n", "\r\n", "\r"])),
        "delimiter": draw(st.sampled_from([","] * 12 + ["\t", ";"])),
        "quoting": draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
    }
    csv.writer(text, **style).writerows([header, *rows])
    data = text.getvalue().encode(draw(st.sampled_from(ENCODINGS)), errors="replace")
    if draw(st.integers(0, 5)) == 0:
        place = draw(st.integers(0, len(data)))
        piece = draw(
            st.sampled_from([b"\0", b'"', b"\xff", b"\n", b"\n\n", b",", b"\xef\xbb\xbf", b"x" * 140_000, b""])
        )
        data = data[:place] + piece + data[place + draw(st.integers(0, 3)) :]
    return data


def expected_rows(data, delimiter):
    """Return the header and rows as Python's csv module reads them; None if the table is not valid."""
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), delimiter=delimiter, strict=True))
    except (csv.Error, UnicodeDecodeError):
        return None
    if b"\0" in data or not rows:
        return None
    header, *rows = rows
    rows = [row for row in rows if len(row) == len(header) or "".join(row).strip()]
    return None if any(len(row) != len(header) for row in rows) else (header, rows)


LETTERS = set("ACDEFGHIKLMNPQRSTVWYXBUZO")


def expected_sequence(text):
    """Return the tokens of a sequence; None if it is invalid."""
    text = "".join(text.split()).removesuffix("*")
    tokens, rest = [], text
    while rest:
        token = "<mask>" if rest.startswith("<mask>") else rest[0]
        rest = rest[len(token) :]
        if token == "<mask>" or token.upper() in LETTERS and token.isascii():
            tokens.append(token if len(token) > 1 else token.upper())
        elif token in string.ascii_letters:
            tokens.append("X")
        elif token not in "-.":
            return None
    return tokens or None


def expected_label(text, task, length):
    """Return the label of a valid row; None if the row is invalid."""
    if not text.strip():
        return None
    if task == "classification":
        return text.strip()
    if task == "residues":
        return list(text) if len(text) == length else None
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) <= 1e18 else None


def expected_data(pairs, task):
    """Return [(tokens, label)] of the valid rows of a table; None if the table is to be refused."""
    valid = []
    for sequence, text in pairs:
        tokens = expected_sequence(sequence)
        label = None if tokens is None else expected_label(text, task, len(tokens))
        if label is not None:
            valid.append((tokens, label))
    classes = {one for _, label in valid for one in (label if task == "residues" else [label])} - {
        "-" if task == "residues" else None
    }
    return None if not valid or (task != "regression" and len(classes) < 2) else valid


def check_read(path, task, pairs, vocabulary, counts):
    """Check what `read_table` makes of a table, given its (sequence, label) pairs; None if it is to be refused."""
    expected = None if pairs is None else expected_data(pairs, task)
    report = Report()
    try:
        data = read_table(path, task, vocabulary, report)
    except UserError as error:
        counts["refused"] += 1
        assert path.name in str(error)
        assert expected is None, (pairs, str(error))
        return
    counts["read"] += 1
    assert expected is not None, pairs
    assert len(report.left_out) == len(pairs) - len(expected)
    assert all(f"{path}, " in message for message in report.left_out)
    assert ["".join(tokens) for tokens, _ in expected] == data.sequences
    for (_, label), ours in zip(expected, data.labels, strict=True):
        if task == "classification":
            assert data.classes[ours] == label
        elif task == "regression":
            assert ours == label
        else:
            assert [data.classes[one] if one >= 0 else "-" for one in ours] == label


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(esm2_tokenizer())


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_text_tables_for_finetune(task, vocabulary, tmp_path):
    counts = Counter()

    @campaign
    @given(text_tables({"sequence": SEQUENCES, "label": LABELS}), st.sampled_from([".csv"] * 6 + [".tsv"]))
    def run(data, suffix):
        path = tmp_path / f"table{suffix}"
        path.write_bytes(data)
        found = expected_rows(data, "\t" if suffix == ".tsv" else ",")
        pairs = None
        if found and found[0].count("sequence") == found[0].count("label") == 1:
            header, rows = found
            pairs = [(row[header.index("sequence")], row[header.index("label")]) for row in rows]
        check_read(path, task, pairs, vocabulary, counts)

    run()
    print(f"finetune, {task}, text tables: {dict(counts)}, shortfalls: 0")
    assert min(counts["read"], counts["refused"]) > EXAMPLES // 50


@pytest.mark.long
def test_tables_of_mutations(tmp_path):
    counts = Counter()
    mutants = st.sampled_from(["M1A", "K2R:T3A", " m1g ", "", "x", "A\nB", '"', "é"])

    @campaign
    @given(text_tables({"sequence": mutants, "label": LABELS}))
    def run(data):
        path = tmp_path / "table.csv"
        path.write_bytes(data)
        found = expected_rows(data, ",")
        try:
            columns, rows = mutations.read_table(path, "sequence")
        except UserError as error:
            counts["refused"] += 1
            assert path.name in str(error)
            assert found is None or "sequence" not in found[0] or len(set(found[0])) < len(found[0])
            return
        counts["read"] += 1
        assert (columns, [list(row.values()) for row in rows]) == found

    run()
    print(f"score, tables: {dict(counts)}, shortfalls: 0")
    assert min(counts["read"], counts["refused"]) > EXAMPLES // 50


COLUMNS = {
    "text": (st.none() | LABELS, pa.string()),
    "large text": (st.none() | LABELS, pa.large_string()),
    "categories": (st.none() | LABELS, pa.dictionary(pa.int32(), pa.string())),
    "integers": (st.none() | st.integers(-9, 9), pa.int64()),
    "booleans": (st.none() | st.booleans(), pa.bool_()),
    "numbers": (st.none() | st.floats(width=32), pa.float32()),
    "decimals": (st.none() | st.integers(-999, 999).map(lambda n: Decimal(n) / 100), pa.decimal128(9, 2)),
    "missing": (st.none(), pa.null()),
    "bytes": (st.binary(max_size=3), pa.binary()),
    "lists": (st.lists(st.integers(0, 3), max_size=3), pa.list_(pa.int64())),
    "records": (st.fixed_dictionaries({"a": st.integers(0, 3)}), pa.struct({"a": pa.int64()})),
}
TEXTS = ("text", "large text", "categories", "missing")
ALLOWED = {
    "classification": (*TEXTS, "integers", "booleans"),
    "regression": (*TEXTS, "integers", "numbers", "decimals"),
    "residues": TEXTS,
}


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_parquet_tables_for_finetune(task, vocabulary, tmp_path):
    counts = Counter()

    @campaign
    @given(st.data())
    def run(data):
        path = tmp_path / "table.parquet"
        kind = data.draw(st.sampled_from([*COLUMNS, *["text"] * 4, *ALLOWED[task]]))
        values, arrow_type = COLUMNS[kind]
        rows = data.draw(st.lists(st.tuples(st.none() | SEQUENCES, values), max_size=8))
        sequences, labels = ([row[i] for row in rows] for i in (0, 1))
        names = data.draw(st.sampled_from([["sequence", "label"]] * 12 + [["sequence", "y"], ["label", "label"]]))
        columns = [pa.array(sequences, pa.string()), pa.array(labels, pa.string()).dictionary_encode()
                   if kind == "categories" else pa.array(labels, arrow_type)]  # fmt: skip
        parquet.write_table(pa.Table.from_arrays(columns, names), path)
        raw, damaged = path.read_bytes(), False
        if data.draw(st.integers(0, 7)) == 0:
            damaged = True
            path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
        pairs = None
        if not damaged and names == ["sequence", "label"] and kind in ALLOWED[task]:
            pairs = [("" if s is None else s, "" if label is None else str(label)) for s, label in rows]
        check_read(path, task, pairs, vocabulary, counts)

    run()
    print(f"finetune, {task}, parquet: {dict(counts)}, shortfalls: 0")
    assert min(counts["read"], counts["refused"]) > EXAMPLES // 50


PIECES = ["x", "a", "/", ".", "..", "#2", "#3", ".npy", "metadata", "ids", "offsets", "mean", "contacts",
          "__metadata__", "%", "%2F", "|", "sp|P1|X", "é", "蛋", "\u0301",
          '"', ",", " ", "\\", "'", "=", "\x7f", "😀"]  # fmt: skip
IDS = st.lists(st.sampled_from(PIECES), max_size=4).map("".join) | st.text(
    st.characters(exclude_categories=["Cs", "Zl", "Zp"], exclude_characters="\0\n\r\x0b\x0c\x1c\x1d\x1e\x85"),
    max_size=6,
)


@pytest.mark.long
@pytest.mark.parametrize("kinds", ["mean", "mean.0 cls.0", "residues", "mean residues chains", "contacts"])
@pytest.mark.parametrize("suffix", results.READERS)
def test_ids_in_every_format(suffix, kinds, tmp_path_factory):
    if kinds == "contacts" and suffix not in ("", ".npz") or suffix == ".csv" and "residues" in kinds:
        pytest.skip("this format has no such array")
    folder, count = tmp_path_factory.mktemp("out"), Counter()

    @settings(campaign, max_examples=EXAMPLES // 20)
    @given(st.lists(IDS, min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 9))
    @example(["x", "x.npy", "x", "x#2", "x.npy", "x#2"], 2, 0)
    def run(ids, chunk_work, seed):
        unique = UniqueIds()
        names = [unique.name(id) for id in ids]
        assert len(set(names)) == len(names)
        assert all(name == id for i, (name, id) in enumerate(zip(names, ids, strict=True)) if id not in names[:i])
        output = folder / f"{count['tries']}{suffix}"
        count["tries"] += 1
        arrays = results.made(names, kinds.split(), seed)
        results.write(names, arrays, output, chunk_work)
        found = results.read(output)
        assert list(found) == names
        for ours, theirs in zip(found.values(), arrays, strict=True):
            assert ours.keys() == theirs.keys()
            for kind, array in theirs.items():
                np.testing.assert_array_equal(ours[kind], array)

    run()
    print(f"{suffix or 'folder'} of {kinds}: {count['tries']} lists of ids, shortfalls: 0")


@pytest.mark.long
def test_fasta_titles_through_embed(tmp_path):
    """The ids in a file are the first words of the titles, numbered where they repeat."""
    model, count = str(write_model(tmp_path / "model")), Counter()
    titles = st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join)

    @settings(campaign, max_examples=EXAMPLES // 30)
    @given(st.lists(st.tuples(titles, st.sampled_from(["MKT", "GGAC", "M1"])), min_size=1, max_size=8))
    def run(records):
        number = count["tries"] = count["tries"] + 1
        fasta = tmp_path / f"{number}.fasta"
        fasta.write_text("".join(f">{t}\n{s}\n" for t, s in records), encoding="utf-8")
        unique, names = UniqueIds(), []
        for i, (title, sequence) in enumerate(records, 1):
            name = unique.name((title.split() or [f"record_{i}"])[0])
            if sequence != "M1":
                names.append(name)
        if not names:
            return
        for suffix in results.READERS:
            embed(fasta, model, tmp_path / f"{number}{suffix}")
            assert list(results.read(tmp_path / f"{number}{suffix}")) == names
        assert len(list(read_proteins(fasta))) == len(names)

    run()
    print(f"{count['tries']} FASTA files through {len(results.READERS)} formats, shortfalls: 0")
