"""What a command shows while it runs, and how it ends.

Exit codes: 0, done; 1, an error; 3, done, but some of the input was left out; 130, stopped by Ctrl-C.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mlx_esm_hf.cli.errors import readable_errors
from mlx_esm_hf.cli.options import (
    Aligned,
    BatchTokens,
    Device,
    Dtype,
    Fasta,
    Long,
    Model,
    Output,
    Quiet,
    Revision,
    Strict,
    loading,
)

if TYPE_CHECKING:
    from mlx_esm_hf.runs.run import Done

LEFT_OUT, STOPPED = 3, 130


def on_proteins(own: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """The command for the function of the same name in `pipelines`: the options that all of them have, and its own.

    Args:
        own: takes the options of its own, and returns what the function is to be called with.
    """

    def command(
        *,
        fasta: Fasta,
        model: Model,
        output: Output,
        revision: Revision = None,
        dtype: Dtype = None,
        device: Device = None,
        long: Long = "error",
        batch_tokens: BatchTokens = "auto",
        aligned: Aligned = False,
        strict: Strict = False,
        quiet: Quiet = False,
        **options: Any,
    ) -> None:
        with job(output, quiet, stdin=fasta == "-") as progress:
            from mlx_esm_hf import pipelines

            arguments = {
                **own(**options),
                **loading(revision, dtype, device, long, batch_tokens),
                **{"aligned": aligned, "strict": strict, "progress": progress},
            }
            report = getattr(pipelines, own.__name__)(fasta, model, output, **arguments)
        finish(report, quiet)

    # What Typer reads: the parameters of both, those of the command's own in front of what is less often needed.
    shared = list(inspect.signature(command).parameters.values())[:-1]
    added = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(own).parameters.values()]
    replaced = {p.name for p in added}
    parameters = [p for p in [*shared[:3], *added, *shared[3:]] if p in added or p.name not in replaced]
    hints = get_type_hints(command, include_extras=True) | get_type_hints(own, include_extras=True)
    command.__annotations__ = {p.name: hints[p.name] for p in parameters}
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(annotation=hints[p.name]) for p in parameters]
    )
    command.__name__, command.__doc__ = own.__name__, own.__doc__
    return command


@contextmanager
def job(output: Path | None, quiet: bool, stdin: bool = False) -> Iterator[Callable[[Done], None]]:
    """Errors as messages, a progress bar on a terminal, and a line about the work at the end."""
    import mlx.core as mx

    quiet = quiet or mx.distributed.init().rank() > 0
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    residues, begin = 0, time.perf_counter()
    columns = (TaskProgressColumn(), BarColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
    try:
        with readable_errors(), Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
            task = bar.add_task("", total=None, speed="")

            def progress(done: Done) -> None:
                nonlocal residues
                residues += done.computed
                speed = f"{residues / (time.perf_counter() - begin):,.0f} residues/s"
                bar.update(task, total=done.total, advance=done.residues, speed=speed)

            yield progress
    except KeyboardInterrupt:
        again = "standard input cannot be taken up again" if stdin else "the same command goes on from there"
        console.print(f"Stopped. What is done is kept in {output}; {again}.", markup=False)
        raise typer.Exit(STOPPED) from None
    if not quiet and residues:
        seconds = time.perf_counter() - begin
        where = "" if output is None else f": {output}"
        console.print(
            f"{residues:,} residues in {seconds:.1f} s ({residues / seconds:,.0f} residues/s){where}", markup=False
        )


def finish(report: object, quiet: bool) -> None:
    """Say what was changed and left out; exit with 3 if something was left out."""
    import mlx.core as mx

    from mlx_esm_hf.data.proteins import Report

    assert isinstance(report, Report)
    if mx.distributed.init().rank() > 0:  # the first one says it
        return
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    if report.replaced and not quiet:
        console.print(f"{report.replaced} letters outside the alphabet were read as X.")
    if report.gaps and not quiet:
        console.print(f"{report.gaps} gaps were dropped; --aligned keeps them.")
    for message in report.left_out:
        console.print(f"Left out: {message}")
    if report.left_out:
        raise typer.Exit(LEFT_OUT)
