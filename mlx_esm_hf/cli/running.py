"""What a command shows while it runs, and its exit codes.

Exit codes: 0, done; 1, an error; 2, a wrong option or argument; 3, done, but some records were left out; 130, stopped
by Ctrl-C; 143, stopped by SIGTERM.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mlx_esm_hf.errors import UserError

if TYPE_CHECKING:
    from mlx_esm_hf.runs.job import Progress

FAILED, LEFT_OUT, STOPPED = 1, 3, 130
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # set by mlx.launch and mpirun
LEFT_OUT_LINES = 10  # printed; the list in the file is complete

logger = logging.getLogger(__name__)


class Running:
    """A running command on the terminal: its progress bar and its summary."""

    def __init__(self, console: Console, quiet: bool):
        self.console, self.quiet = console, quiet
        self.residues, self.computing = 0, 0.0  # computed, and the seconds that took
        self.phase, self.title, self.began = "loading", "loading the model", time.perf_counter()
        self.seconds = defaultdict[str, float](float)  # of each phase
        texts = (TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), TextColumn("{task.fields[doing]}"))
        columns = (TaskProgressColumn(), BarColumn(), *texts)
        self.bar = Bar(*columns, console=console, disable=quiet or not console.is_terminal)
        self.task = self._new_task(None)

    def _new_task(self, total: int | None) -> Any:
        return self.bar.add_task("", total=total, speed="", doing=escape(self.title))

    def _enter(self, phase: str, title: str = "", total: int | None = None) -> None:
        """Begin a phase, with a bar of its own."""
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.began
        self.phase, self.title, self.began = phase, title, now
        self.bar.remove_task(self.task)
        self.task = self._new_task(total)

    def show(self, progress: Progress) -> None:
        """Advance the progress bar. Jobs call this after each step and at the beginning of each phase."""
        if progress.phase:
            self._enter(progress.phase, progress.doing, progress.residues_total)
        self.residues += progress.residues_computed
        self.computing += progress.seconds
        self.bar.update(
            self.task,
            total=progress.residues_total,
            advance=progress.residues_done,
            speed=self._speed() if self.phase == "computing" else "",
            doing=escape(progress.doing or self.title),
        )

    def _speed(self) -> str:
        return f"{self.residues / self.computing:,.0f} residues/s" if self.residues and self.computing else ""

    def finish(self, output: Path, report: Any) -> None:
        """Print what was computed, changed and left out, and exit with code 3 if records were left out.

        Args:
            output: the file or folder that was written.
            report: the `Report` returned by the job.
        """
        self._enter("finished")
        if self.residues and not self.quiet:
            writing = self.seconds["writing"] + self.seconds["computing"] - self.computing
            self.console.print(
                f"{self.residues:,} residues in {duration(self.computing)} ({self._speed()}); "
                f"loading {duration(self.seconds['loading'])}, writing {duration(writing)}: {output}"
            )
        if report.replaced and not self.quiet:
            self.console.print(f"{report.replaced} letters outside the alphabet were read as {report.unknown}.")
        if report.gaps and not self.quiet:
            self.console.print(
                f"{report.gaps} gaps were dropped{'; --aligned keeps them' if report.can_align else ''}."
            )
        if report.renamed and not self.quiet:
            self.console.print(f"{report.renamed} records repeat an earlier id and are called id#2, id#3, …")
        if not is_other_rank():
            self._list_left_out(output, report.left_out)

    def _list_left_out(self, output: Path, left_out: list[str]) -> None:
        """Print the first messages. If some are not printed, also write all of them to a file next to the output."""
        from mlx_esm_hf.runtime.files import replace_file

        path = output.with_name(f"{output.name}.left_out.txt")
        lines = [" ".join(message.split()) for message in left_out]
        shown = [] if self.quiet else lines[:LEFT_OUT_LINES]
        if len(lines) > len(shown):
            replace_file(path, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
        else:
            path.unlink(missing_ok=True)  # of an earlier run with this output
        for line in shown:
            self.console.print(f"Left out: {line}")
        if shown and len(lines) > len(shown):
            self.console.print(f"and {len(lines) - len(shown)} more: see {path}")
        if lines:
            raise SystemExit(LEFT_OUT)


def duration(seconds: float) -> str:
    """Return a duration with the digits that matter: 0.02 s, 1.4 s, 1,250 s."""
    return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:,.1f} s" if seconds < 100 else f"{seconds:,.0f} s"


@contextmanager
def running(output: Path | None, quiet: bool = False, source: str = "") -> Iterator[Running]:
    """Run a job with a progress bar on a terminal, and print user errors without a traceback.

    Args:
        output: what the command writes.
        quiet: print only errors.
        source: where the proteins come from.
    """
    run = Running(stderr(), quiet or is_other_rank())
    with reporting_errors(lambda: stopped_job(output, source)), notices(not run.quiet), run.bar:
        yield run


@contextmanager
def training(output: Path, quiet: bool) -> Iterator[Running]:
    """Run a training, which has a progress bar of its own, and print user errors without a traceback.

    Args:
        output: the folder of the training.
        quiet: print only errors.
    """
    run = Running(stderr(), quiet or is_other_rank())
    with reporting_errors(lambda: stopped_training(output)), notices(not run.quiet):
        yield run


def stopped_job(output: Path | None, source: str) -> str:
    """Return the message after a job was stopped: where its progress is saved, and how to resume it."""
    from mlx_esm_hf.data.source import is_stream
    from mlx_esm_hf.runs.outputs import shards_of

    folder = output if output is None or not output.suffix else shards_of(output)
    if folder is None or not folder.exists():
        return "Stopped. Nothing was written."
    if is_stream(source):
        return f"Stopped. Input from a stream cannot be read again, so this run cannot be resumed. Remove {folder}."
    return f"Stopped. Progress is saved in {folder}; run the same command again to continue."


def stopped_training(output: Path) -> str:
    """Return the message after a training was stopped: the checkpoint it resumes from."""
    from mlx_esm_hf.training.checkpoints import checkpoints_in

    checkpoints = checkpoints_in(output) if output.is_dir() else []
    if not checkpoints:
        return "Stopped before the first checkpoint; the same command starts from the beginning."
    return f"Stopped. Progress is saved in {checkpoints[-1]}; run the same command again to continue."


def stderr() -> Console:
    """Return a console on standard error that prints text as it is."""
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def reporting_errors(stopped: Callable[[], str] = lambda: "Stopped.") -> Iterator[None]:
    """Print user errors as messages and exit with the right code; other exceptions are bugs and keep their traceback.

    Args:
        stopped: returns the message after Ctrl-C or SIGTERM, which rank 0 prints.
    """
    try:
        yield
    except (UserError, OSError, MemoryError) as error:
        stderr().print(f"[bold red]Error:[/] {escape(str(error) or type(error).__name__)}", markup=True)
        raise SystemExit(FAILED) from error
    except KeyboardInterrupt as stop:
        if not is_other_rank():
            stderr().print(stopped())
        raise SystemExit(getattr(stop, "exit_code", STOPPED)) from None


@contextmanager
def notices(shown: bool) -> Iterator[None]:
    """Log each Python warning as one line, like the package's own log; hide both if they are not `shown`.

    Bars of downloads are hidden with them.

    Every notice of a command is a warning or a log message, so this is the only place that decides about them.
    """
    before = logging.root.manager.disable
    with warnings.catch_warnings(), nullcontext() if shown else hidden_downloads():
        warnings.showwarning = lambda message, *_: logger.warning("%s", message)
        logging.disable(before if shown else max(before, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def hidden_downloads() -> Iterator[None]:
    """Hide the progress bars of downloads."""
    from huggingface_hub import utils as hub

    if hub.are_progress_bars_disabled():
        yield
        return
    hub.disable_progress_bars()
    try:
        yield
    finally:
        hub.enable_progress_bars()


def is_other_rank() -> bool:
    """Return whether rank 0 of this run, another process, prints the messages."""
    if not any(name in os.environ for name in LAUNCHED):
        return False  # one process, which need not import MLX to know

    from mlx_esm_hf.runtime import distributed

    return not distributed.is_rank_0()


def print_training_summary(output: Path, perplexity: bool = False) -> None:
    """Print the last loss and the last validation metrics of a training's log.

    Args:
        output: the training's folder.
        perplexity: also print the perplexity, for language models.
    """
    import json
    import math

    lines = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = next(line for line in reversed(lines) if "loss" in line)
    typer.echo(f"{trained['step']} steps, {trained['tokens']:,} tokens; loss {trained['loss']:.3f}: {output}", err=True)
    for line in reversed(lines):
        if "eval_loss" in line:
            metrics = {name: x for name, x in line.items() if name.startswith("eval_") and name != "eval_runtime"}
            if perplexity:
                metrics["perplexity"] = math.exp(line["eval_loss"])
            text = ", ".join(f"{name.removeprefix('eval_')} {value:.4g}" for name, value in metrics.items())
            typer.echo(f"validation: {text}", err=True)
            return
