"""Invalid ids are found before the work, and different ids never collide in files."""

import csv

import numpy as np
import pytest

from mlx_esm_hf import contacts, embed, fill_mask, generate, perplexity
from mlx_esm_hf.runs import ids
from mlx_esm_hf.runs.ids import LONGEST_ID, FileNames, Ids, UniqueIds
from tests.jobs.models import write_model
from tests.runs.results import made, read, write

SUFFIXES = ["", ".npz", ".safetensors", ".h5", ".parquet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("esm2")))


ODD = {"NUL": "a\0b", "half a character": "a\ud800", "very long": "x" * 40_000, "two lines": "a\nb"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_invalid_ids_are_left_out(suffix, folder, tmp_path):
    computed = []
    records = [(id, "MKT") for id in ["a", *ODD.values(), "b"]]
    report = embed(records, folder, tmp_path / f"out{suffix}", progress=computed.append)
    assert len(report.left_out) == len(ODD) and sum(progress.residues_computed for progress in computed) == 6
    for message, said in zip(
        report.left_out, ["NUL", "unpaired surrogate", "at most 32768", "line break"], strict=True
    ):
        assert said in message and len(message) < 300
    with pytest.raises(ValueError, match="has a NUL in its id"):
        embed(records, folder, tmp_path / f"strict{suffix}", strict=True)


def test_survey_finds_nul_in_ids(folder, tmp_path):
    """A zip archive would cut both ids to the same name."""
    (tmp_path / "in.fasta").write_bytes(b">a\0b\nMKT\n>a\0c\nMKT\n")
    with pytest.raises(ValueError, match="(?s)contains no proteins.*has a NUL in its id.*has a NUL in its id"):
        embed(tmp_path / "in.fasta", folder, tmp_path / "out.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


def test_a_repeated_id_gets_a_number():
    """The first record keeps its id, and no two names are equal."""
    unique = UniqueIds()
    ids = ["a", "a", "a#2", "b", "a", "c#2", "c", "c", "A"]
    assert [unique.name(id) for id in ids] == ["a", "a#2", "a#2#2", "b", "a#3", "c#2", "c", "c#3", "A"]
    assert unique.renamed == 4


FASTA = ">sp|P1|X long title\nMKTAYI\n>a\nM1\n>a\nMK<mask>AYI\n>sp|P1|X\nMK<mask>AY\n>x/y\nGG<mask>\n>a\nMKT\n"
RENAMED = ["sp|P1|X", "a#2", "sp|P1|X#2", "x/y", "a#3"]  # the first `a` is left out, in every job


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".csv"])
def test_all_formats_have_the_same_ids_in_the_order_of_the_file(suffix, folder, tmp_path):
    (tmp_path / "in.fasta").write_text(FASTA)
    report = embed(tmp_path / "in.fasta", folder, tmp_path / f"out{suffix}")
    assert list(read(tmp_path / f"out{suffix}")) == RENAMED
    assert report.renamed == 3 and len(report.left_out) == 1 and "'a' has '1'" in report.left_out[0]


@pytest.mark.parametrize("job", [perplexity, contacts, fill_mask, generate])
def test_all_jobs_have_the_same_ids(job, folder, tmp_path):
    (tmp_path / "in.fasta").write_text(FASTA)
    output = tmp_path / "out"
    job(tmp_path / "in.fasta", folder, output)
    masked = job in (fill_mask, generate)
    expected = RENAMED[1:4] if masked else RENAMED
    assert list(read(output)) == expected
    assert [result.id for result in job(tmp_path / "in.fasta", folder)] == expected
    if job in (perplexity, fill_mask):
        job(tmp_path / "in.fasta", folder, tmp_path / "out.csv")
        with open(tmp_path / "out.csv", newline="") as file:
            assert list(dict.fromkeys(row["id"] for row in csv.DictReader(file))) == expected
    if job is contacts:
        contacts(tmp_path / "in.fasta", folder, tmp_path / "out.npz")
        assert list(read_maps(tmp_path / "out.npz")) == expected
    if job is generate:
        generate(tmp_path / "in.fasta", folder, tmp_path / "out.fasta", samples=2)
        titles = [line[1:].split()[0] for line in (tmp_path / "out.fasta").read_text().splitlines() if line[0] == ">"]
        assert titles == [f"{id}_{sample}" for id in expected for sample in (1, 2)]


def read_maps(path):
    with np.load(path) as file:
        return {id: file[id] for id in file["ids"].tolist()}


def test_samples_of_one_protein_repeat_its_id(folder, tmp_path):
    generate([("a", "M<mask>"), ("a", "K<mask>")], folder, tmp_path / "out", samples=2)
    with open(tmp_path / "out" / "index.csv", newline="") as file:
        rows = [(row["id"], row["sample"]) for row in csv.DictReader(file)]
    assert rows == [("a", "1"), ("a", "2"), ("a#2", "1"), ("a#2", "2")]


def test_longest_ids_fit_into_every_format(tmp_path):
    ids = ["/" * LONGEST_ID, "é" * (LONGEST_ID // 2), "x" * LONGEST_ID]
    for suffix in SUFFIXES:
        arrays = made(ids, ["mean"])
        write(ids, arrays, tmp_path / f"out{suffix}")
        assert list(read(tmp_path / f"out{suffix}")) == ids
    write(ids, made(ids, ["contacts"]), tmp_path / "map.npz")
    assert list(read_maps(tmp_path / "map.npz")) == ids


@pytest.mark.parametrize(("suffix", "pooling"), [(".safetensors", "mean"), (".npz", "mean"), (".npz", "residues")])
def test_too_many_ids_for_a_format(suffix, pooling, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ids, "HEADER", 1000)
    monkeypatch.setattr(ids, "ID_ARRAY", 1000)
    fasta = tmp_path / "in.fasta"
    fasta.write_text("".join(f">protein{i}\nMKT\n" for i in range(100)))
    with pytest.raises(ValueError, match="more than .* proteins.*Choose .h5, .parquet or a folder of shards"):
        embed(fasta, folder, tmp_path / f"out{suffix}", pooling=[pooling])
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]
    report = embed(fasta, folder, tmp_path / "out.h5", pooling=[pooling])
    assert not report.left_out


def test_header_size_is_estimated_closely(folder, tmp_path):
    """The size counted before the work is an upper bound, and not much larger than the real size."""
    records = [(f'protein "{i}" of é', "MKT") for i in range(300)]
    embed(records, folder, tmp_path / "out.safetensors", pooling=["residues", "mean"])
    with open(tmp_path / "out.safetensors", "rb") as file:
        written = int.from_bytes(file.read(8), "little")
    counted = Ids(".safetensors")
    for id, _ in records:
        counted.add(id)
    assert written - 1000 <= counted.header <= 2 * written


def test_file_names():
    """Safe on all systems, readable, and different even if case is ignored."""
    named = {
        "sp|P12345|ONE_HUMAN": "P12345",
        "p12345": "p12345_2",
        "P12345_2": "P12345_2_2",
        "a/b": "a_b",
        "../../up": "_.._.._up",
        ".hidden": "_.hidden",
        "": "_",
        "-rf": "_-rf",
        "é": "__",
        "x" * 300: "x" * 150,
        "x" * 299: "x" * 150 + "_2",
    }
    names = FileNames()
    assert {id: names.name(id) for id in named} == named
