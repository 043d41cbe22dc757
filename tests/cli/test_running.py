"""How a command ends: a sentence for a mistake, a traceback for a bug, neither for Ctrl-C."""

import io
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import typer
from rich.console import Console

from mlx_esm_hf.cli.options import tokens_of
from mlx_esm_hf.cli.running import Running, running
from mlx_esm_hf.runs.job import Progress
from mlx_esm_hf.runs.run import read_manifest
from mlx_esm_hf.runtime import process
from tests.jobs.models import write_model
from tests.processes import ENVIRONMENT


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
def test_a_bug_keeps_its_traceback(bug, tmp_path, capsys):
    with pytest.raises((TypeError, AttributeError, ValueError, RuntimeError)), running(tmp_path / "out"):
        bug()
    assert "Error:" not in capsys.readouterr().err


def test_a_mistake_is_told_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(process, "_owner", -1)
    for mistake, said in (
        (lambda: tokens_of("many"), "--batch-tokens many: auto, or a number of tokens, is needed."),
        (process.check_process, "This process was forked from -1 after a model had been made there"),
        (lambda: np.zeros(1 << 50), "Unable to allocate"),
        (Path("/nowhere/in.fasta").read_bytes, "No such file or directory: '/nowhere/in.fasta'"),
    ):
        with pytest.raises(typer.Exit) as caught, running(tmp_path / "out"):
            mistake()
        line = capsys.readouterr().err
        assert caught.value.exit_code == 1 and line.startswith("Error: ") and said in line and line.count("\n") == 1


# Ctrl-C comes when the module is looked for that the first argument names.
INTERRUPTED = """
import signal, sys
sys.modules["torch"] = None  # which transformers would import: that takes seconds
name = sys.argv.pop(1)
class Interrupt:
    def find_spec(looked_for, *rest):
        if looked_for == name:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
from mlx_esm_command import main
main()
"""


@pytest.mark.parametrize(
    "module",
    [
        "mlx_esm_hf",
        "mlx.core",
        "typer",
        "mlx_esm_hf.jobs.embed",
        "mlx_esm_hf.ops.kernels",
    ],
)
def test_ctrl_c_while_importing_is_no_traceback(module, tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nMKT\n")
    arguments = ["embed", "in.fasta", "--model", write_model(tmp_path / "model"), "--output", "out.npz"]
    script = [sys.executable, "-c", INTERRUPTED, module, *arguments]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 130 and "Stopped." in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out.npz").exists()


def test_a_bug_as_the_command_shows_it(tmp_path):
    broken = "import mlx_esm_hf.jobs.embed as p; p.embed = len; from mlx_esm_command import main; main()"
    script = [sys.executable, "-c", broken, "embed", "in.fasta", "--model", "m", "--output", "out.npz"]
    done = subprocess.run(script, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("TypeError: len() takes")


def test_what_is_being_done_is_shown():
    """Within a step, when no residues are done yet; an id may look like markup."""
    terminal = io.StringIO()
    run = Running(Console(file=terminal, force_terminal=True, width=200), quiet=False)
    with run.bar:
        run.show(Progress(0, 0, 100, "[b]p1 (76 residues), pass 2 of 4"))
        run.bar.refresh()
        assert "[b]p1 (76 residues), pass 2 of 4" in terminal.getvalue()
        run.show(Progress(76, 76, 100))
    assert "76%" in terminal.getvalue() and "residues/s" in terminal.getvalue()
