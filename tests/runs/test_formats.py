"""Files of results."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from mlx_esm_hf.runs.formats import write_h5
from mlx_esm_hf.runs.job import Item, Job, no_progress
from mlx_esm_hf.runs.run import compute_run

FULL = """
import resource, sys
from pathlib import Path
from tests.runs.test_formats import large_run
from mlx_esm_hf.runs.formats import write_h5

run = large_run(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    write_h5(Path(sys.argv[1]) / "out.h5", run)
except OSError as error:
    print(error.strerror)
"""


def large_run(folder):
    """A finished run: 100 results of two kinds."""

    def compute(items):
        return [{"mean": np.arange(32.0), "residues": np.full((20, 32), item.number)} for item in items]

    items = [Item(number, f"p{number}", None, 20, 1, 1) for number in range(100)]
    job = Job("test", {}, {"name": "x", "sha256": "y"}, lambda: items, compute, chunk_work=100)
    return compute_run(job, folder / "run", no_progress)


def test_h5_holds_what_was_computed(tmp_path):
    write_h5(tmp_path / "out.h5", large_run(tmp_path))
    with h5py.File(tmp_path / "out.h5") as file:
        assert len(file) == 100 and file["p7"].keys() == {"mean", "residues"}
        assert (file["p7/residues"][:] == 7).all() and file["p7/mean"].attrs["original_id"] == "p7"


@pytest.mark.parametrize("size", [0, 100, 5_000, 300_000])
def test_h5_on_a_full_disk_is_an_error_and_no_crash(size, tmp_path):
    """HDF5 alone ends in a segmentation fault."""
    command = [sys.executable, "-c", FULL, tmp_path, str(size)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "File too large\n"), done.stderr
