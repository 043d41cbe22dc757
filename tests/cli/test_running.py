"""How commands end: user errors print one line, bugs a traceback, Ctrl-C a note."""

import io
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import typer
from rich.console import Console

from mlx_esm_hf.cli.options import parse_batch_tokens
from mlx_esm_hf.cli.running import Running, running
from mlx_esm_hf.runs.job import Progress
from mlx_esm_hf.runs.run import read_manifest
from mlx_esm_hf.runtime import process
from tests.jobs.models import write_model
from tests.processes import ENVIRONMENT, RESTORE_SIGINT


def raise_from_elsewhere():
    raise RuntimeError("not ours")


BUGS = {
    "TypeError": lambda: len(None),
    "TypeError in a function of ours": lambda: read_manifest(7),
    "AttributeError": lambda: None.shape,
    "ValueError of Python": lambda: int("many"),
    "ValueError of NumPy": lambda: np.ones(2) + np.ones(3),
    "ValueError of MLX": lambda: mx.ones(2) + mx.ones(3),
    "RuntimeError": raise_from_elsewhere,
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_bug_keeps_its_traceback(bug, tmp_path, capsys):
    with pytest.raises((TypeError, AttributeError, ValueError, RuntimeError)), running(tmp_path / "out"):
        bug()
    assert "Error:" not in capsys.readouterr().err


def test_user_error_prints_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(process, "_owner", -1)
    for mistake, said in (
        (lambda: parse_batch_tokens("many"), "--batch-tokens must be auto or a positive integer, got many."),
        (process.check_process, "This process was forked from -1 after a model had been made there"),
        (lambda: np.zeros(1 << 50), "Unable to allocate"),
        (Path("/nowhere/in.fasta").read_bytes, "No such file or directory: '/nowhere/in.fasta'"),
    ):
        with pytest.raises(typer.Exit) as caught, running(tmp_path / "out"):
            mistake()
        line = capsys.readouterr().err
        assert caught.value.exit_code == 1 and line.startswith("Error: ") and said in line and line.count("\n") == 1


# Raises SIGINT when the module named by the first argument is imported.
INTERRUPTED = f"""
{RESTORE_SIGINT}
import sys
sys.modules["torch"] = None  # keeps transformers from importing torch, which takes seconds
name = sys.argv.pop(1)
class Interrupt:
    def find_spec(looked_for, *rest):
        if looked_for == name:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
from mlx_esm_hf.__main__ import main
main()
"""


@pytest.mark.parametrize(
    "module",
    [
        "mlx_esm_hf.cli",
        "typer",
        "mlx_esm_hf.jobs.embed",
        "mlx_esm_hf.ops.kernels",
    ],
)
def test_ctrl_c_while_importing_has_no_traceback(module, tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nMKT\n")
    arguments = ["embed", "in.fasta", "--model", write_model(tmp_path / "model"), "--output", "out.npz"]
    script = [sys.executable, "-c", INTERRUPTED, module, *arguments]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 130 and "Stopped." in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out.npz").exists()


def test_bug_in_a_command_keeps_its_traceback(tmp_path):
    broken = "import mlx_esm_hf.jobs.embed as p; p.embed = len; from mlx_esm_hf.__main__ import main; main()"
    script = [sys.executable, "-c", broken, "embed", "in.fasta", "--model", "m", "--output", "out.npz"]
    done = subprocess.run(script, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("TypeError: len() takes")


def test_progress_shows_the_current_item(monkeypatch):
    """The text is shown before any residue is done, even if an id looks like markup."""
    monkeypatch.setenv("TERM", "xterm")
    terminal = io.StringIO()
    run = Running(Console(file=terminal, force_terminal=True, width=200), quiet=False)
    with run.bar:
        run.show(Progress(0, 0, 100, "[b]p1 (76 residues), pass 2 of 4"))
        run.bar.refresh()
        assert "[b]p1 (76 residues), pass 2 of 4" in terminal.getvalue()
        run.show(Progress(76, 76, 100))
    assert "76%" in terminal.getvalue() and "residues/s" in terminal.getvalue()
