"""Ids that files cannot hold are found before the work, and no two become one."""

import numpy as np
import pytest

from mlx_esm_hf import embed
from mlx_esm_hf.runs import ids
from mlx_esm_hf.runs.ids import FileNames, Ids
from tests.jobs.models import write_model

SUFFIXES = ["", ".npz", ".safetensors", ".h5", ".parquet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("esm2")))


ODD = {"NUL": "a\0b", "half a character": "a\ud800", "very long": "x" * 40_000, "two lines": "a\nb"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_no_file_holds_is_left_out(suffix, folder, tmp_path):
    computed = []
    records = [(id, "MKT") for id in ["a", *ODD.values(), "b"]]
    report = embed(records, folder, tmp_path / f"out{suffix}", progress=computed.append)
    assert len(report.left_out) == len(ODD) and sum(progress.computed for progress in computed) == 6
    for message, said in zip(report.left_out, ["NUL", "half of a character", "32768 at most", "lines"], strict=True):
        assert said in message and len(message) < 300
    with pytest.raises(ValueError, match="has a NUL in its id"):
        embed(records, folder, tmp_path / f"strict{suffix}", strict=True)


def test_a_nul_in_a_file_is_found_by_the_survey(folder, tmp_path):
    """Two ids that a zip archive would cut to one."""
    (tmp_path / "in.fasta").write_bytes(b">a\0b\nMKT\n>a\0c\nMKT\n")
    with pytest.raises(ValueError, match="(?s)holds no proteins.*has a NUL in its id.*has a NUL in its id"):
        embed(tmp_path / "in.fasta", folder, tmp_path / "out.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


NAMES = ["x", "x.npy", "x.npy.npy", ".", "", "..", "__metadata__", "metadata", "a/b", "a_b", "./mean", "/mean", "mean",
         "5_.", "sp|.|x", "5_a_b", "é", "x#2"]  # fmt: skip


@pytest.mark.parametrize("pooling", [["residues"], ["mean", "residues"]], ids="+".join)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".h5"])
def test_no_two_ids_become_one(suffix, pooling, folder, tmp_path):
    records = [(name, "M" + "A" * i) for i, name in enumerate(NAMES)]
    for order in (records, records[::-1]):
        output = tmp_path / f"out{suffix}"
        embed(order, folder, output, pooling=pooling)
        assert sorted(len(array) for array in read(output, suffix)) == list(range(1, len(NAMES) + 1))
        output.unlink()


def read(path, suffix):
    """The states of residues, each through the name that a reader would ask for."""
    if suffix == ".npz":
        with np.load(path) as file:
            return [file[name] for name in file.files if file[name].ndim == 2]
    if suffix == ".safetensors":
        from safetensors.numpy import load_file

        return [array for array in load_file(path).values() if array.ndim == 2]
    import h5py

    with h5py.File(path) as file:
        found = [file[key]["residues"] if isinstance(file[key], h5py.Group) else file[key] for key in file]
        assert {dataset.attrs["original_id"] for dataset in found} == set(NAMES)
        return [dataset[:] for dataset in found]


@pytest.mark.parametrize(
    ("suffix", "pooling"), [(".safetensors", "mean"), (".npz", "mean"), (".safetensors", "residues")]
)
def test_more_ids_than_a_file_holds(suffix, pooling, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ids, "HEADER", 1000)
    monkeypatch.setattr(ids, "ID_ARRAY", 1000)
    fasta = tmp_path / "in.fasta"
    fasta.write_text("".join(f">protein{i}\nMKT\n" for i in range(100)))
    with pytest.raises(ValueError, match="proteins and more.*choose .h5, .parquet or a folder of shards"):
        embed(fasta, folder, tmp_path / f"out{suffix}", pooling=[pooling])
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]
    report = embed(fasta, folder, tmp_path / "out.h5", pooling=[pooling])
    assert not report.left_out


def test_the_header_is_as_large_as_it_is_said(folder, tmp_path):
    """What is counted before the work is no less than what is written, nor much more."""
    records = [(f'protein "{i}" of é', "MKT") for i in range(300)]
    for pooling, arrays in ((["mean"], 0), (["residues", "mean"], 2)):
        embed(records, folder, tmp_path / "out.safetensors", pooling=pooling)
        with open(tmp_path / "out.safetensors", "rb") as file:
            written = int.from_bytes(file.read(8), "little")
        (tmp_path / "out.safetensors").unlink()
        counted = Ids(".safetensors", arrays)
        for id, _ in records:
            counted.add(id)
        assert written - 1000 <= counted.header <= 2 * written


def test_names_of_files():
    """Safe everywhere, readable, and no two alike, be it where `a` and `A` are one name."""
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
