"""Output files: the same ids and arrays in every format, reproducible bytes, modes, and errors of a full disk."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_esm_hf import embed
from tests.jobs.models import UBIQUITIN, write_model
from tests.runs.results import made, read, write

SUFFIXES = [".npz", ".safetensors", ".h5", ".parquet"]
NAMES = ["x", "x.npy", "x.npy.npy", ".", "", "..", "__metadata__", "metadata", "ids", "offsets", "mean", "a/b", "a_b",
         "a%2Fb", "./mean", "/mean", "x/contacts", "x.npy/contacts", "sp|P12345|X", "tr|P12345|X", "é", "x#2", "b", "a",
         'q"', "a,b", "=1", "%"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("esm2")))


@pytest.mark.parametrize("kinds", ["mean", "mean.0 mean.3", "residues", "mean residues chains"])
@pytest.mark.parametrize("suffix", ["", ".csv", *SUFFIXES])
def test_every_format_gives_back_ids_and_arrays(suffix, kinds, tmp_path):
    kinds = kinds.split()
    if suffix == ".csv" and "residues" in kinds:
        pytest.skip("a CSV file has one row for each protein")
    arrays = made(NAMES, kinds)
    write(NAMES, arrays, tmp_path / f"out{suffix}")
    check(read(tmp_path / f"out{suffix}"), arrays)


def test_maps_have_their_ids_as_names(tmp_path):
    arrays = made(NAMES, ["contacts"])
    write(NAMES, arrays, tmp_path / "out.npz")
    check(read(tmp_path / "out.npz"), arrays)
    with np.load(tmp_path / "out.npz") as file:
        np.testing.assert_array_equal(file["a_b"], arrays[NAMES.index("a_b")]["contacts"])


def check(found, arrays, names=NAMES):
    assert list(found) == names
    for ours, theirs in zip(found.values(), arrays, strict=True):
        assert ours.keys() == theirs.keys()
        for kind, array in theirs.items():
            assert ours[kind].dtype == array.dtype
            np.testing.assert_array_equal(ours[kind], array)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_layout_does_not_depend_on_the_pooling(suffix, tmp_path):
    """A vector has the same place in the file whether or not residues are next to it."""
    both = made(NAMES, ["mean", "residues"])
    write(NAMES, both, tmp_path / f"both{suffix}")
    write(NAMES, [{"mean": arrays["mean"]} for arrays in both], tmp_path / f"mean{suffix}")
    if suffix == ".npz":
        load = np.load
    else:
        from safetensors.numpy import load_file as load
    one, two = load(tmp_path / f"mean{suffix}"), load(tmp_path / f"both{suffix}")
    np.testing.assert_array_equal(one["mean"], two["mean"])
    assert set(two) - set(one) == {"residues", "offsets"}
    assert two["residues"].shape == (two["offsets"][-1], 5) and len(two["offsets"]) == len(NAMES) + 1


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize("suffix", [".csv", *SUFFIXES])
def test_mode_follows_the_umask(suffix, umask, tmp_path):
    before = os.umask(umask)
    try:
        write(["a"], made(["a"], ["mean"]), tmp_path / f"out{suffix}")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / f"out{suffix}").stat().st_mode) == 0o666 & ~umask


def test_csv_refuses_residues_before_the_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="can't write residues, because a `.csv` file has one row.* Use .h5"):
        embed(["MKT"], "no model is loaded", tmp_path / "out.csv", pooling=["mean", "residues"])


def test_csv_gives_back_every_bit(tmp_path):
    values = np.random.default_rng(0).integers(0, 1 << 32, (50, 40), np.uint32).view(np.float32)
    values[~np.isfinite(values)] = 0.1
    arrays = [{"mean": row} for row in values]
    write([str(i) for i in range(50)], arrays, tmp_path / "out.csv")
    found = np.stack([row["mean"] for row in read(tmp_path / "out.csv").values()])
    np.testing.assert_array_equal(found.view(np.uint32), values.view(np.uint32))


def documented_lines():
    """Return {suffix: line of Python} of the table of formats in the documentation."""
    page = Path(__file__).parents[2] / "docs" / "jobs" / "files.md"
    return dict(re.findall(r"^\| `?([.\w]+)`? \|.*\| `([^`]+)` \|$", page.read_text("utf-8"), re.MULTILINE))


@pytest.mark.parametrize("suffix", ["folder", ".csv", *SUFFIXES])
def test_documented_line_opens_each_format(suffix, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "embeddings" + suffix.removeprefix("folder")
    expected = {result.id: result.arrays["mean"] for result in embed([("a", "MKT"), ("b", UBIQUITIN)], folder)}
    embed([("a", "MKT"), ("b", UBIQUITIN)], folder, name)
    values = {}
    exec(documented_lines()[suffix], values)
    found = values["mean"]
    if isinstance(found, dict):
        assert list(found) == list(expected)
        found = list(found.values())
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.stack(list(expected.values())))


@pytest.mark.parametrize("pooling", ["mean", "residues"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bytes_are_reproducible(suffix, pooling, tmp_path):
    """The safetensors library writes metadata in random order, one of thousands here."""
    written = set()
    ids = ["a", 'é\x7f\t"']
    for i in range(4):
        output = tmp_path / f"{i}{suffix}"
        write(ids, made(ids, [pooling]), output)
        written.add(output.read_bytes())
    assert len(written) == 1


LIMITED = """
import resource, sys
from mlx_esm_hf import embed
def limit(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
if sys.argv[3] == "limited":
    from mlx_esm_hf.runs import run
    write_files = run.write_files
    run.write_files = lambda *arguments: (limit(), write_files(*arguments))
embed(sys.argv[1], sys.argv[2], sys.argv[4], pooling=["residues"], batch_tokens=512)
"""


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".h5", ".parquet"])
def test_full_disk_is_reported_and_the_command_resumes(suffix, folder, tmp_path):
    fasta, output = tmp_path / "in.fasta", tmp_path / f"out{suffix}"
    fasta.write_text("".join(f">{i}\n{UBIQUITIN * 2}\n" for i in range(20)))
    command = [sys.executable, "-c", LIMITED, str(fasta), folder]
    done = subprocess.run([*command, "limited", str(output)], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"OSError: {output} cannot be written (") and last.endswith("again to continue."), (
        done.stderr
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fasta", f"out{suffix}.shards"]
    subprocess.run([*command, "free", str(output)], check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fasta", f"out{suffix}"]
