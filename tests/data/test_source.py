"""Reading proteins from files and Python objects."""

import gzip
import hashlib
import io
import sys

import pytest
import zstandard
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_esm_hf.data.proteins import Protein, Report
from mlx_esm_hf.data.source import ProteinSource, read_proteins
from mlx_esm_hf.errors import UserError

COMPRESSIONS = {"plain": lambda b: b, "gzip": gzip.compress, "zstd": lambda b: zstandard.ZstdCompressor().compress(b)}


@pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS)
@pytest.mark.parametrize(
    "encode", [str.encode, lambda s: s.replace("\n", "\r\n").encode(), lambda s: s.encode("utf-8-sig")]
)
def test_reads_files_and_standard_input(tmp_path, monkeypatch, compress, encode):
    data = compress(encode("\n>sp|P1|ONE first of two\nMKT\nayi\n\n>two\nG G\n"))
    path = tmp_path / "proteins.fasta"
    path.write_bytes(data)
    expected = [Protein("sp|P1|ONE", "MKTAYI", f"{path}, line 2"), Protein("two", "GG", f"{path}, line 6")]
    assert list(read_proteins(path)) == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))
    assert [p[:2] for p in read_proteins("-")] == [p[:2] for p in expected]


def test_reads_python_objects():
    records = ["MKT", ("a", "gg"), SeqRecord(Seq("AC"), id="b"), ("c", None), ("d", float("nan")), None, (1, 2, 3)]
    report = Report()
    assert [p[:2] for p in read_proteins(records, report=report)] == [("1", "MKT"), ("a", "GG"), ("b", "AC")]
    assert report.left_out[:2] == [
        "record 4: 'c' is not a sequence, but None.",
        "record 5: 'd' is not a sequence, but nan.",
    ]
    assert len(report.left_out) == 4


def test_chains():
    report = Report()
    (protein, plain) = read_proteins(["mk-t:GG*:J", "MKT"], report=report, chains=True)
    assert (protein.sequence, plain.sequence) == ("MKT:GG:X", "MKT")
    assert (report.gaps, report.replaced, report.left_out) == (1, 1, [])


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ("MKT:", "is empty, in chain 2"),
        ("::MKT", "is empty, in chain 1"),
        ("MKT:M3", "has '3' at position 2, which is not a residue, in chain 2"),
        ("MK3", "has '3' at position 3, which is not a residue"),
    ],
)
def test_chains_that_cannot_be_read(sequence, message):
    report = Report()
    assert list(read_proteins([("a", sequence)], report=report, chains=True)) == []
    assert report.left_out == [f"record 1: 'a' {message}."]


def test_colon_is_refused_without_chains():
    report = Report()
    assert list(read_proteins([("a", "MKT:GG")], report=report)) == []
    assert report.left_out == ["record 1: 'a' has ':' at position 4, which is not a residue."]


def test_bad_record_is_named_and_left_out(tmp_path):
    path = tmp_path / "p.fasta"
    path.write_text(">a\nMKT\n>empty\n>stop in it\nMK*T\nAA\n>\nGG\n")
    report = Report()
    assert [p[:2] for p in read_proteins(path, report=report)] == [("a", "MKT"), ("record_4", "GG")]
    assert report.left_out == [
        f"{path}, line 3: 'empty' is empty.",
        f"{path}, line 4: 'stop' has a stop (*) at position 3, before its end: cut or split the sequence there.",
    ]
    with pytest.raises(ValueError, match="line 3: 'empty' is empty"):
        list(read_proteins(path, report=Report(strict=True)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"MKTAYIAK\n", "line 1: this is not FASTA"),
        (b"\x89PNG\x00\xff\xfe", "line 1: this is not FASTA"),
        (gzip.compress(b">one\n" + b"MKT" * 1000)[:-20], "damaged in the first record"),
        (gzip.compress(b">one\n" + b"MKT" * 1000)[:-6] + b"\0" * 6, "damaged in the first record"),
        (
            zstandard.ZstdCompressor().compress(b">one\n" + b"MKT" * 1000)[:9] + b"\xff" * 40,
            "damaged in the first record",
        ),
        (zstandard.ZstdCompressor().compress(b">one\n" + b"MKT" * 1000)[:-3], "ends within a frame"),
    ],
    ids=["no title", "binary", "cut gzip", "corrupt gzip", "corrupt zstd", "cut zstd"],
)
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "proteins.fasta"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_proteins(path))
    assert str(path) in str(error.value)


def test_several_zstandard_frames_are_one_file(tmp_path):
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "p.fasta.zst").write_bytes(compress(b">a\nMK") + compress(b"T\n>b\nGG\n"))
    assert [p[:2] for p in read_proteins(tmp_path / "p.fasta.zst")] == [("a", "MKT"), ("b", "GG")]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file_has_no_proteins(tmp_path, content):
    (tmp_path / "none.fasta").write_text(content)
    with pytest.raises(UserError, match="none.fasta contains no proteins: the file is empty"):
        list(read_proteins(tmp_path / "none.fasta"))


@given(st.binary(max_size=300) | st.text(st.sampled_from(">\n\r MKTJ*-<mask>;1"), max_size=300).map(str.encode))
@example(b">\r>\r")
@example(b"\x1f\x8b")
@example(b"\x28\xb5\x2f\xfd")
def test_any_file_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.fasta"
    path.write_bytes(data)
    report = Report()
    try:
        proteins = list(read_proteins(path, report=report))
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert all(protein.id and protein.sequence for protein in proteins)
    assert all(str(path) in message and "line" in message for message in report.left_out)


def test_file_can_be_read_again_and_has_a_checksum(tmp_path):
    path = tmp_path / "p.fasta"
    path.write_text(">a\nMKT\n>b\nGG\n")
    source = ProteinSource.open(path)
    assert (source.name, source.can_reread, source.is_stream) == ("p.fasta", True, False)
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and not source.has_changed()
    assert [protein.id for protein in source.peek(1)] == ["a"]
    assert [protein.id for protein in source.read()] == ["a", "b"]
    path.write_text(">a\nMKT\n")
    assert source.has_changed()


def test_objects_have_no_checksum_and_are_kept_by_peek():
    source = ProteinSource.open(iter(["MKT", "GG"]))
    assert (source.name, source.can_reread, source.is_stream, source.sha256) == ("Python", False, False, None)
    assert [protein.sequence for protein in source.peek(1)] == ["MKT"]
    assert [protein.sequence for protein in source.read()] == ["MKT", "GG"]
    assert not source.has_changed()


def test_standard_input_is_a_stream(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(b">a\nMKT\n"))))
    source = ProteinSource.open("-")
    assert (source.name, source.can_reread, source.is_stream, source.sha256) == ("-", False, True, None)
    assert source.peek(1) == []
    assert [protein.id for protein in source.read()] == ["a"]


def test_reads_mappings():
    """A mapping gives ids and sequences, such as the result of `Bio.SeqIO.to_dict`."""
    mapping = {"a": "MKT", "b": SeqRecord(Seq("AC"), id="b")}
    assert [(p.id, p.sequence) for p in read_proteins(mapping)] == [("a", "MKT"), ("b", "AC")]
    source = ProteinSource.open(mapping)
    assert [p.id for p in source.peek(1)] == ["a"] and [p.id for p in source.read()] == ["a", "b"]
