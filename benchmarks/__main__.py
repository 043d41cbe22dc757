"""The command `python -m benchmarks`."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import report
from benchmarks.models import DEFAULT, SHAPES
from benchmarks.peers import cores
from benchmarks.worker import REPOSITORY
from benchmarks.workloads import TOLERANCE, WITHOUT_CHECKPOINT, WORKLOADS, Result, Session, Settings, alternate

DEFAULT_MODELS = ",".join(DEFAULT)


def chosen(names: str, known: list[str]) -> list[str]:
    """Return the values of a comma-separated option, in the order of `known`."""
    picked = [name.strip() for name in names.split(",")]
    if unknown := [name for name in picked if name not in known]:
        raise typer.BadParameter(f"must be one of {', '.join(known)}, got {', '.join(unknown)}")
    return [name for name in known if name in picked]


Peers = dict[str, dict[str, str]]


def measure(
    models: list[str], workloads: list[str], fasta: Path, settings: Settings, console: Console
) -> Iterator[tuple[Result, Peers]]:
    """Yield each result with the peers' descriptions of themselves. Only one model's workers run at a time."""
    for model in models:
        wanted = [
            name
            for name in workloads
            if model in WORKLOADS[name][1] or (model == "tiny" and not name.startswith("fold"))
        ]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(settings.cores) as pool:
            session = Session(model, None, settings, pool)
            if set(wanted) - WITHOUT_CHECKPOINT:
                session.folder = Path(folder, "checkpoint")
                command = [sys.executable, "-m", "benchmarks.models", model, str(session.folder), str(fasta.resolve())]
                more = ["converted"] if "quantized" in wanted else []
                subprocess.run([*command, *more], check=True, cwd=REPOSITORY)
            try:
                for name in wanted:
                    cases = list(WORKLOADS[name][0](session))
                    for case in cases:
                        start = time.monotonic()
                        budget = settings.budget / len(cases)
                        yield alternate(session, name, case, Path(folder), budget), session.about
                        console.print(f"{name} {model}, {case.name}: {time.monotonic() - start:.0f} s")
            finally:
                session.close()


def main(
    models: Annotated[str, typer.Option(help=f"Comma-separated, from {DEFAULT_MODELS},ESMFold.")] = DEFAULT_MODELS,
    workloads: Annotated[str, typer.Option(help="Comma-separated, from those of the default.")] = ",".join(WORKLOADS),
    fasta: Annotated[Path, typer.Option(help="FASTA file, plain or gzipped.", exists=True, dir_okay=False)] = (
        REPOSITORY / "examples" / "proteins.fasta"
    ),
    proteins: Annotated[
        int | None, typer.Option(help="Number of proteins to embed. Default: 64, or 16 for 650M.", min=2)
    ] = None,
    repeats: Annotated[int, typer.Option(help="Maximum number of rounds of each case.", min=1)] = 5,
    budget: Annotated[
        float, typer.Option(help="Seconds for a workload. After that, only required rounds are measured.")
    ] = 45,
    at_least: Annotated[float, typer.Option(help="Seconds. A faster call is repeated until they have passed.")] = 0.25,
    dtype: Annotated[str, typer.Option(help=f"For a GPU, one of {', '.join(TOLERANCE)}.")] = "float32",
    esm_cpp_python: Annotated[str, typer.Option(help="Python interpreter with esm-cpp installed.")] = sys.executable,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write. Default: benchmarks-<date>.json.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Markdown file to write the tables to.")] = None,
) -> None:
    """Measure this library and its peers in alternation, with the same weights, cores and proteins.

    Ratios (ours ÷ peer) are computed within a round; the result is their median. The exit code is 1 if a peer failed or
    its results differ from ours.
    """
    (dtype,) = chosen(dtype, list(TOLERANCE))
    settings = Settings(repeats, budget, at_least, dtype, proteins, esm_cpp_python, len(cores()))
    errors, about = Console(stderr=True, highlight=False), report.machine()
    picked = chosen(models, list(SHAPES)), chosen(workloads, list(WORKLOADS))
    json_file = json_file or Path(f"benchmarks-{datetime.date.today()}.json")
    results: list[Result] = []
    about["peers"], grids = {}, list[report.Grid]()
    for result, peers in measure(*picked, fasta, settings, errors):  # an interrupted run keeps its results so far
        results.append(result)
        about["peers"] |= peers
        rows, goals = report.entries(results), report.targets(results)
        grids = report.grids(rows, goals)
        json_file.write_text(json.dumps({"machine": about, "results": rows, "targets": goals}, indent=1) + "\n")
        if markdown:
            markdown.write_text(report.markdown(about, grids), encoding="utf-8")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    for grid in grids:
        console.print(report.draw(grid))
    failures = {f"{r.workload} {r.model} {name}": why for r in results for name, why in r.failed.items()}
    for name, why in failures.items():
        errors.print(f"{name}: {why}", markup=False)
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
