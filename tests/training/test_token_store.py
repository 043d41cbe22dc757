import gzip
import os

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


def test_holds_what_the_file_holds(vocabulary, tmp_path):
    packed = tmp_path / "proteins.fasta.gz"
    with open(PROTEINS, "rb") as file:
        packed.write_bytes(gzip.compress(file.read()))
    expected = [vocabulary.encode(protein.sequence) for protein in read_proteins(PROTEINS)]
    for path in (PROTEINS, packed):
        store = open_store(path, tmp_path / f"{os.path.basename(path)}.store", vocabulary, Report())
        assert len(store) == len(expected) == 100
        assert store.lengths.tolist() == [len(ids) for ids in expected]
        for number, ids in enumerate(expected):
            assert np.array_equal(store[number], ids)


def test_is_made_once_and_again_when_the_file_is_another(vocabulary, tmp_path):
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


def test_what_is_no_proteins_is_said(vocabulary, tmp_path):
    empty = tmp_path / "empty.fasta"
    empty.write_text("")
    with pytest.raises(ValueError, match="empty.fasta holds no proteins"):
        open_store(empty, tmp_path / "store", vocabulary, Report())
    with pytest.raises(ValueError, match="is no file"):
        open_store(tmp_path / "nowhere.fasta", tmp_path / "store", vocabulary, Report())


def test_equal_sequences_are_on_one_side(vocabulary, tmp_path):
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 30)) for _ in range(2000)]
    fasta = tmp_path / "a.fasta"
    fasta.write_text("".join(f">{i}\n{sequence}\n" for i, sequence in enumerate(sequences + sequences)))
    training, held_out = split(open_store(fasta, tmp_path / "store", vocabulary, Report()), 0.1)
    assert sorted([*training, *held_out]) == list(range(4000))
    assert set(held_out % 2000) == set(held_out[held_out < 2000])
    assert abs(len(held_out) / 2 - 200) < 5 * np.sqrt(2000 * 0.1 * 0.9)
