import gzip

import pytest

from mlx_esm_hf.pipelines.fasta import Protein, read_fasta


@pytest.mark.parametrize("compress", [lambda b: b, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    "encode", [str.encode, lambda s: s.replace("\n", "\r\n").encode(), lambda s: s.encode("utf-8-sig")]
)
def test_reads_what_people_have(tmp_path, compress, encode):
    path = tmp_path / "proteins.fasta"
    path.write_bytes(compress(encode(">sp|P1|ONE first of two\nMKT\nayi\n\n>two\nGG\n")))
    assert list(read_fasta(path)) == [Protein("sp|P1|ONE", "MKTAYI"), Protein("two", "GG")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b">one\nMKT\n>two\n>three\nGG\n", "the record 'two' is empty"),
        (b"MKTAYIAK\n", "does not begin with a title line"),
        (b"\x89PNG\x00\xff\xfe", "no text"),
        (gzip.compress(b">one\n" + b"MKT" * 1000)[:-20], "gzip stream is damaged"),
        (gzip.compress(b">one\n" + b"MKT" * 1000)[:-6] + b"\0" * 6, "gzip stream is damaged"),
    ],
    ids=["empty record", "no title", "binary", "cut gzip", "corrupt gzip"],
)
def test_names_file_and_record(tmp_path, content, message):
    path = tmp_path / "proteins.fasta"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_fasta(path))
    assert str(path) in str(error.value)


def test_empty_file_has_no_proteins(tmp_path):
    (tmp_path / "none.fasta").touch()
    assert list(read_fasta(tmp_path / "none.fasta")) == []
