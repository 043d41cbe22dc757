"""How commands end: user errors print one line, bugs a traceback, Ctrl-C a note."""

import io
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from mlx_esm_hf.cli import app
from mlx_esm_hf.cli.options import parse_batch_tokens
from mlx_esm_hf.cli.running import Running, running
from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.runs.job import COMPUTING, LOADING, WRITING, Progress, begin
from mlx_esm_hf.runs.run import read_manifest
from mlx_esm_hf.runtime import process
from tests.jobs.models import write_model
from tests.processes import ENVIRONMENT, LOST_RANK, MAIN, RESTORE_SIGINT, start_ranks


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
        (
            lambda: parse_batch_tokens("many"),
            "--batch-tokens must be auto or a positive integer up to 2147483647, got many.",
        ),
        (process.check_process, "This process was forked from -1 after a model had been made there"),
        (lambda: np.zeros(1 << 50), "Unable to allocate"),
        (Path("/nowhere/in.fasta").read_bytes, "No such file or directory: '/nowhere/in.fasta'"),
    ):
        with pytest.raises(SystemExit) as caught, running(tmp_path / "out"):
            mistake()
        line = capsys.readouterr().err
        assert caught.value.code == 1 and line.startswith("Error: ") and said in line and line.count("\n") == 1


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
        run.show(begin(COMPUTING, residues_total=100))
        run.show(Progress(0, 0, 100, "[b]p1 (76 residues), pass 2 of 4"))
        run.bar.refresh()
        assert "[b]p1 (76 residues), pass 2 of 4" in terminal.getvalue()
        run.show(Progress(76, 76, 100, seconds=0.5))
    assert "76%" in terminal.getvalue() and "residues/s" in terminal.getvalue()


def test_phases_have_their_own_bars_and_times(monkeypatch, tmp_path):
    """Speed is that of computing only, and a bar at 100% is followed by another one while files are written."""
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr("mlx_esm_hf.cli.running.time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setenv("TERM", "xterm")
    terminal = io.StringIO()
    run = Running(Console(file=terminal, width=200, highlight=False), quiet=False)
    shown = []
    for progress in (
        begin(LOADING, "reading in.fasta"),
        Progress(100, 0, None),
        begin(COMPUTING, residues_total=100),
        Progress(100, 100, 100, seconds=4),
        begin(WRITING, "writing out.h5", 100),
        Progress(50, 0, 100),
    ):
        run.show(progress)
        (task,) = run.bar.tasks
        shown.append((task.fields["doing"], task.completed, task.total))
    assert shown[:2] == [("reading in.fasta", 0, None), ("reading in.fasta", 100, None)]
    assert shown[2:4] == [("", 0, 100), ("", 100, 100)]
    assert shown[4:] == [("writing out.h5", 0, 100), ("writing out.h5", 50, 100)]
    run.finish(tmp_path / "out.h5", Report())
    assert "100 residues in 4.0 s (25 residues/s); loading 20.0 s, writing 16.0 s: " in terminal.getvalue()


@pytest.mark.parametrize("output", ["out.npz", "folder"])
def test_left_out_records_are_listed_in_a_file(output, tmp_path, capsys):
    """Ten are printed, none with --quiet. A later run replaces or removes the list."""
    path = tmp_path / f"{output}.left_out.txt"
    messages = [f"in.fasta, line {i}: 'p\n{i}' is empty." for i in range(150)]

    def finish(count, quiet):
        with pytest.raises(SystemExit) as caught, running(tmp_path / output, quiet) as run:
            run.finish(tmp_path / output, Report(left_out=messages[:count]))
        assert caught.value.code == 3
        return capsys.readouterr().err.splitlines()

    assert finish(150, quiet=False)[-1] == f"and 140 more: see {path}"
    assert len(path.read_text().splitlines()) == 150
    assert len(finish(11, quiet=False)) == 11
    assert finish(2, quiet=True) == [] and len(path.read_text().splitlines()) == 2
    assert finish(2, quiet=False)[0].startswith("Left out: ") and not path.exists()


def test_quiet_hides_every_notice(tmp_path, caplog):
    for quiet, said in ((False, ["from Python", "from the log"]), (True, [])):
        with running(tmp_path / "out", quiet):
            warnings.warn("from Python", RuntimeWarning, stacklevel=1)
            logging.getLogger("mlx_esm_hf.x").warning("from the log")
        assert caplog.messages == said
        caplog.clear()


def test_survivor_of_a_lost_rank_says_so(tmp_path):
    """No traceback, whether the connection is lost in a job or in a training."""
    (tmp_path / "in.fasta").write_text(">a\nMKTAYI\n>b\nMKTAYIAK\n")
    for arguments in (["embed", "in.fasta", "-m", "demo"], ["train", "in.fasta", "--shape", "1,8,1"]):
        command = [*MAIN, *arguments, "--output", tmp_path / "out"]
        survivor, _ = start_ranks(command, LOST_RANK, folder=tmp_path, cwd=tmp_path)
        said = [line for line in survivor.communicate(timeout=300)[1].splitlines() if not line.startswith("[ring]")]
        assert survivor.returncode == 1 and said[-1].startswith("Error: Another process of this run was lost."), said
        assert not [line for line in said if "Traceback" in line]


# Runs the command, and sends SIGTERM to it when the method given by the first argument has returned.
TERMINATED = """
import importlib, os, signal, sys
sys.modules["torch"] = None
module, name = sys.argv.pop(1).split(":")
module = importlib.import_module(module)
function = getattr(module, name)
def function_and_stop(*args, **kwargs):
    result = function(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGTERM)
    return result
setattr(module, name, function_and_stop)
from mlx_esm_hf.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("after", "arguments", "said"),
    [
        (
            "runs.run:shard_name",
            ["embed", "in.fasta", "-m", "demo"],
            "Progress is saved in out.npz.shards; run",
        ),
        ("training.trainer:write_checkpoint", ["train", "in.fasta"], "Progress is saved in out/checkpoint-1; run the"),
        ("training.pretrain:new_model", ["train", "in.fasta"], "Stopped before the first checkpoint"),
    ],
)
def test_sigterm_ends_like_ctrl_c(after, arguments, said, tmp_path):
    (tmp_path / "in.fasta").write_text("".join(f">p{i}\nMKTAYIAK\n" for i in range(9)))
    if arguments[0] == "train":
        arguments = [*arguments, "--shape", "1,8,1", "--steps", "3", "--save-every", "1", "--validation-share", "0"]
    output = "out.npz" if arguments[0] == "embed" else "out"
    script = [sys.executable, "-c", TERMINATED, f"mlx_esm_hf.{after}", *arguments, "--output", output]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 143, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr, done.stderr


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_version():
    from mlx_esm_hf import __version__

    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"mlx-esm {__version__}\n")
