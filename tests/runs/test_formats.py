"""Output files: reproducible bytes, and errors of a full disk."""

import subprocess
import sys

import pytest

from mlx_esm_hf import embed
from tests.jobs.models import UBIQUITIN, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("esm2")))


@pytest.mark.parametrize("pooling", ["mean", "residues"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".h5", ".parquet"])
def test_bytes_are_reproducible(suffix, pooling, folder, tmp_path):
    """The safetensors library writes metadata in random order, one of thousands here."""
    written = set()
    for i in range(4):
        output = tmp_path / f"{i}{suffix}"
        embed([("a", UBIQUITIN), ('é\x7f\t"', "MKT")], folder, output, pooling=[pooling])
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
