"""Invalid ids are found before the work, and different ids never collide in files."""

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


NAMES = ["x", "x.npy", "x.npy.npy", ".", "", "..", "__metadata__", "metadata", "a/b", "a_b", "./mean", "/mean", "mean",
         "5_.", "sp|.|x", "5_a_b", "é", "x#2"]  # fmt: skip


@pytest.mark.parametrize("pooling", [["residues"], ["mean", "residues"]], ids="+".join)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".h5"])
def test_different_ids_never_become_the_same_name(suffix, pooling, folder, tmp_path):
    records = [(name, "M" + "A" * i) for i, name in enumerate(NAMES)]
    for order in (records, records[::-1]):
        output = tmp_path / f"out{suffix}"
        embed(order, folder, output, pooling=pooling)
        assert sorted(len(array) for array in read(output, suffix)) == list(range(1, len(NAMES) + 1))
        output.unlink()


def read(path, suffix):
    """Read the states of residues by name."""
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
    for pooling, arrays in ((["mean"], 0), (["residues", "mean"], 2)):
        embed(records, folder, tmp_path / "out.safetensors", pooling=pooling)
        with open(tmp_path / "out.safetensors", "rb") as file:
            written = int.from_bytes(file.read(8), "little")
        (tmp_path / "out.safetensors").unlink()
        counted = Ids(".safetensors", arrays)
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
