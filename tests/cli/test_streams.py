"""Standard streams that are closed, full, or a pipe without a reader."""

import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.processes import ENVIRONMENT, MAIN

COMMAND = shlex.join(MAIN)
FULL = "Error: Standard output cannot be written (No space left on device).\n"

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def bash(line, folder):
    """Run a line of bash, in which `mlx-esm` is the command. Returns its exit code and standard error."""
    script = ["bash", "-c", f'set -o pipefail; mlx-esm() {{ {COMMAND} "$@"; }}; {line}']
    done = subprocess.run(script, cwd=folder, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, timeout=300)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mlx-esm --help > /dev/full", (1, FULL)),
        ("mlx-esm env > /dev/full", (1, FULL)),
        ("mlx-esm --version >&-", (1, "Error: Standard output cannot be written (it is closed).\n")),
        ("mlx-esm --version | true", (1, "")),
        ("mlx-esm --version > /dev/full 2> /dev/full", (1, "")),
    ],
)
def test_output_that_cannot_be_written(line, expected, tmp_path):
    assert bash(line, tmp_path) == expected


def test_results_do_not_depend_on_the_streams(tmp_path):
    """Nor does a file get the descriptor of a closed stream."""
    (tmp_path / "in.fasta").write_text(">a\nMKTAYI\n>b\n\n")
    code, _ = bash("mlx-esm embed in.fasta -m demo -o out.npz <&- >&- 2>&-", tmp_path)
    assert code == 3 and (tmp_path / "out.npz").exists()
    with np.load(tmp_path / "out.npz") as file:
        assert file["ids"].tolist() == ["a"]
