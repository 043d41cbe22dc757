"""What a command shows while it runs, and how it ends.

Exit codes: 0, done; 1, an error; 3, done, but some of the input was left out; 130, stopped by Ctrl-C.
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
    """A command at work, on the terminal."""

    def __init__(self, console: Console, quiet: bool):
        self.console, self.quiet = console, quiet
        self.residues, self.begin = 0, time.perf_counter()
        texts = (TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), TextColumn("{task.fields[doing]}"))
        columns = (TaskProgressColumn(), BarColumn(), *texts)
        self.bar = Bar(*columns, console=console, disable=quiet or not console.is_terminal)
        self.task = self.bar.add_task("", total=None, speed="", doing="")

    def show(self, progress: Progress) -> None:
        """Move the bar; the jobs call this."""
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
        """Say what was computed, changed and left out; exit with 3 if something was left out.

        Args:
            report: the `Report` that a job returns for an output.
        """
        if self.residues and not self.quiet:
            seconds = time.perf_counter() - self.begin
            speed = f"{self.residues / seconds:,.0f} residues/s"
            self.console.print(f"{self.residues:,} residues in {seconds:.1f} s ({speed}): {output}")
        if report.replaced and not self.quiet:
            self.console.print(f"{report.replaced} letters outside the alphabet were read as X.")
        if report.gaps and not self.quiet:
            self.console.print(f"{report.gaps} gaps were dropped; --aligned keeps them.")
        if report.left_out and not other_rank():
            for message in report.left_out:
                self.console.print(f"Left out: {message}")
            raise typer.Exit(LEFT_OUT)


@contextmanager
def running(output: Path | None, quiet: bool = False, source: str = "") -> Iterator[Running]:
    """Around the work of a job: a progress bar on a terminal, and errors as messages.

    Args:
        output: what the command writes.
        quiet: print nothing but errors.
        source: of the proteins.
    """
    run = Running(stderr(), quiet or other_rank())
    with told(run.console, lambda: f"Stopped. What is done is kept in {output}; {going_on(source)}."), run.bar:
        yield run


def going_on(source: str) -> str:
    """Whether what was stopped can be taken up again."""
    from mlx_esm_hf.data.source import ProteinSource

    if ProteinSource.open(source).is_stream:
        return "what is read only once cannot be taken up again"
    return "the same command goes on from there"


def stderr() -> Console:
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def told(console: Console, stopped: Callable[[], str]) -> Iterator[None]:
    """Around what may fail: errors as messages, and the exit codes; bugs keep their traceback.

    Args:
        stopped: what to say after Ctrl-C.
    """
    try:
        yield
    except (UserError, OSError, MemoryError) as error:
        console.print(f"[bold red]Error:[/] {escape(str(error) or type(error).__name__)}", markup=True)
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt:
        console.print(stopped())
        raise typer.Exit(STOPPED) from None


def other_rank() -> bool:
    """Whether another process of this run, the first rank, does the talking."""
    import mlx.core as mx

    return mx.distributed.init().rank() > 0
