"""Token ids of proteins on disk."""

import gzip
import os
import shutil

import numpy as np
import pytest

from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.source import read_proteins
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.token_store import open_store, split

PROTEINS = "examples/proteins.fasta"


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(esm2_tokenizer())


def test_a_store_contains_the_proteins_of_the_file(vocabulary, tmp_path):
    compressed = tmp_path / "proteins.fasta.gz"
    with open(PROTEINS, "rb") as file:
        compressed.write_bytes(gzip.compress(file.read()))
    expected = [vocabulary.encode(protein.sequence) for protein in read_proteins(PROTEINS)]
    for path in (PROTEINS, compressed):
        store = open_store(path, tmp_path / f"{os.path.basename(path)}.store", vocabulary, Report())
        assert len(store) == len(expected) == 100
        assert store.lengths.tolist() == [len(ids) for ids in expected]
        for index, ids in enumerate(expected):
            assert np.array_equal(store[index], ids)


def test_a_store_is_made_again_when_the_file_changes(vocabulary, tmp_path):
    fasta, folder = tmp_path / "a.fasta", tmp_path / "store"
    fasta.write_text(">a\nMKT\n>b\nM1T\n>c\nMKTAY\n")
    report = Report()
    assert open_store(fasta, folder, vocabulary, report).lengths.tolist() == [3, 5]
    assert len(report.left_out) == 1
    assert "a.fasta, line 3: 'b'" in report.left_out[0]
    before = os.stat(folder / "tokens.bin").st_ino
    open_store(fasta, folder, vocabulary, report)
    assert os.stat(folder / "tokens.bin").st_ino == before
    fasta.write_text(">a\nMKTW\n")
    assert open_store(fasta, folder, vocabulary, report).lengths.tolist() == [4]
    assert [path.name for path in tmp_path.iterdir() if ".part" in path.name] == []


def test_files_without_proteins_are_refused(vocabulary, tmp_path):
    empty = tmp_path / "empty.fasta"
    empty.write_text("")
    with pytest.raises(ValueError, match="empty.fasta contains no proteins"):
        open_store(empty, tmp_path / "store", vocabulary, Report())
    with pytest.raises(ValueError, match="must be a FASTA file"):
        open_store(tmp_path / "nowhere.fasta", tmp_path / "store", vocabulary, Report())


def test_duplicates_are_on_the_same_side(vocabulary, tmp_path):
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 30)) for _ in range(2000)]
    fasta = tmp_path / "a.fasta"
    fasta.write_text("".join(f">{i}\n{sequence}\n" for i, sequence in enumerate(sequences + sequences)))
    training, held_out = split(open_store(fasta, tmp_path / "store", vocabulary, Report()), 0.1)
    assert sorted([*training, *held_out]) == list(range(4000))
    assert set(held_out % 2000) == set(held_out[held_out < 2000])
    assert abs(len(held_out) / 2 - 200) < 5 * np.sqrt(2000 * 0.1 * 0.9)


@pytest.mark.parametrize("name", ["tokens.bin", "ends.npy", "hashes.npy", "checksums.txt"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_store_is_an_error_that_names_the_file(name, damage, vocabulary, tmp_path):
    fasta, folder = tmp_path / "a.fasta", tmp_path / "store"
    fasta.write_text(">a\nMKT\n>b\nMKTAYIAK\n")
    checksum = open_store(fasta, folder, vocabulary, Report()).sha256
    data = (folder / name).read_bytes()
    if damage == "remove":
        (folder / name).unlink()
    else:
        flipped = bytes([data[0] ^ 1]) + data[1:]
        (folder / name).write_bytes(data[: len(data) // 2] if damage == "truncate" else flipped)
    with pytest.raises(ValueError, match=r"(not found|damaged).*Remove .*store: it is made again from .*a\.fasta"):
        open_store(fasta, folder, vocabulary, Report())
    shutil.rmtree(folder)
    assert open_store(fasta, folder, vocabulary, Report()).sha256 == checksum


@pytest.mark.parametrize("text", ["", "[]", "null", "{"])
def test_a_store_with_a_damaged_description_is_made_again(text, vocabulary, tmp_path):
    fasta, folder = tmp_path / "a.fasta", tmp_path / "store"
    fasta.write_text(">a\nMKT\n")
    checksum = open_store(fasta, folder, vocabulary, Report()).sha256
    (folder / "store.json").write_text(text)
    store = open_store(fasta, folder, vocabulary, Report())
    assert store.sha256 == checksum and store.lengths.tolist() == [3]


def test_leftovers_of_a_killed_process_are_removed(vocabulary, tmp_path):
    """Also next to a finished store: a kill may come after it got its name."""
    open_store(PROTEINS, tmp_path / "0", vocabulary, Report())
    leftover = tmp_path / ".0.0123abcd.part"
    leftover.mkdir()
    open_store(PROTEINS, tmp_path / "0", vocabulary, Report())
    assert not leftover.exists()
