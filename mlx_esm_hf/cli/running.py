"""What a command shows while it runs, and its exit codes.

Exit codes: 0, done; 1, an error; 3, done, but some records were left out; 130, stopped by Ctrl-C.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class Running:
    """A running command on the terminal: its progress bar and its summary."""

    def __init__(self, console: Console, quiet: bool):
        self.console, self.quiet = console, quiet
        self.residues, self.begin = 0, time.perf_counter()
        texts = (TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), TextColumn("{task.fields[doing]}"))
        columns = (TaskProgressColumn(), BarColumn(), *texts)
        self.bar = Bar(*columns, console=console, disable=quiet or not console.is_terminal)
        self.task = self.bar.add_task("", total=None, speed="", doing="")

    def show(self, progress: Progress) -> None:
        """Advance the progress bar. Jobs call this after each step."""
        self.residues += progress.residues_computed
        speed = f"{self.residues / (time.perf_counter() - self.begin):,.0f} residues/s" if self.residues else ""
        self.bar.update(
            self.task,
            total=progress.residues_total,
            advance=progress.residues_done,
            speed=speed,
            doing=escape(progress.doing),
        )

    def finish(self, output: Path, report: Any) -> None:
        """Print what was computed, changed and left out, and exit with code 3 if records were left out.

        Args:
            output: the file or folder that was written.
            report: the `Report` returned by the job.
        """
        if self.residues and not self.quiet:
            seconds = time.perf_counter() - self.begin
            speed = f"{self.residues / seconds:,.0f} residues/s"
            self.console.print(f"{self.residues:,} residues in {seconds:.1f} s ({speed}): {output}")
        if report.replaced and not self.quiet:
            self.console.print(f"{report.replaced} letters outside the alphabet were read as X.")
        if report.gaps and not self.quiet:
            self.console.print(f"{report.gaps} gaps were dropped; --aligned keeps them.")
        if report.left_out and not is_other_rank():
            for message in report.left_out:
                self.console.print(f"Left out: {message}")
            raise typer.Exit(LEFT_OUT)


@contextmanager
def running(output: Path | None, quiet: bool = False, source: str = "") -> Iterator[Running]:
    """Run a job with a progress bar on a terminal, and print user errors without a traceback.

    Args:
        output: what the command writes.
        quiet: print only errors.
        source: where the proteins come from.
    """
    run = Running(stderr(), quiet or is_other_rank())
    with (
        reporting_errors(run.console, lambda: f"Stopped. Progress is saved in {output}; {resume_hint(source)}."),
        run.bar,
    ):
        yield run


def resume_hint(source: str) -> str:
    """Return whether and how a stopped run can be resumed."""
    from mlx_esm_hf.data.source import ProteinSource

    if ProteinSource.open(source).is_stream:
        return "input from a stream cannot be read again, so this run cannot be resumed"
    return "run the same command again to resume"


def stderr() -> Console:
    """Return a console on standard error that prints text as it is."""
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def reporting_errors(console: Console, stopped: Callable[[], str]) -> Iterator[None]:
    """Print user errors as messages and exit with the right code; other exceptions are bugs and keep their traceback.

    Args:
        console: where to print.
        stopped: returns the message after Ctrl-C.
    """
    try:
        yield
    except (UserError, OSError, MemoryError) as error:
        console.print(f"[bold red]Error:[/] {escape(str(error) or type(error).__name__)}", markup=True)
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt:
        console.print(stopped())
        raise typer.Exit(STOPPED) from None


def is_other_rank() -> bool:
    """Return whether rank 0 of this run, another process, prints the messages."""
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
