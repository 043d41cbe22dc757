"""Results as tables, JSON and markdown."""

from __future__ import annotations

import datetime
import itertools
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks.peers import cores
from benchmarks.worker import REPOSITORY
from benchmarks.workloads import BEST, DYNAMIC, ESMC, OURS, PEAK, USUAL, Result

PACKAGES = ("mlx-esm-hf", "mlx", "scipy-openblas32", "numpy", "torch", "transformers", "fair-esm", "esm-cpp")


class Target(NamedTuple):
    """A target for a ratio: ours ÷ the best peer whose name starts with `against`.

    The ratio must be at least `bound`, or at most `bound` for memory. The target applies to cases whose names end in
    `case`. `ours` is the name of our runner.
    """

    workload: str
    models: tuple[str, ...]
    against: str
    bound: float
    case: str = ""
    ours: str = OURS


TARGETS = (
    Target("bulk", ("8M", "150M", "tiny", *ESMC), "transformers", 1.25),
    Target("bulk", ("8M", "150M", "tiny", *ESMC), USUAL, 3),
    Target("bulk", ("650M", "ESM-1b"), "transformers", 1.15),
    Target("bulk", ("650M", "ESM-1b"), USUAL, 2.5),
    Target("uniform", ("150M", "650M", "tiny", *ESMC), "", 1.15),
    Target("single", ("8M", "150M", "650M", "tiny", *ESMC), "", 1.1, "256 residues"),
    Target("training", ("8M", "35M", "150M", "tiny", *ESMC), "transformers", 1.2, "8 x 256 tokens"),
    Target("training", ("8M", "35M", "150M", "tiny", *ESMC), "transformers", 1.5, "proteins as they arrive, 4 a batch"),
    Target("training", ("8M", "35M", "150M", "tiny", *ESMC), "transformers", 1, "peak memory"),
    Target("fold", ("ESMFold trunk",), "transformers", 1.5, "256 residues"),
    Target("fold", ("ESMFold trunk",), "transformers", 1.5, "384 residues"),
    Target("fold", ("ESMFold trunk",), "transformers", 0.6, "256 residues, peak memory"),
    Target("fold", ("ESMFold trunk",), "transformers", 0.6, "384 residues, peak memory"),
    *(
        Target(workload, ("ESMFold2 parts",), "transformers", target, f"{length} tokens, {case}")
        for length in (64, 128, 256, 384)
        for workload, case, target in (
            ("fold2", "trunk", 2.0),
            ("fold2", "4 samples, denoiser", 2.0),
            ("fold2-memory", "trunk", 0.6),
            ("fold2-memory", "denoiser", 0.6),
        )
    ),
    Target("encoder", ("650M", "tiny"), "gemm", 0.85),
    Target("quantized", ("650M",), BEST[0], 2, "proteins", "ours, 8 bits, int8"),
    Target("quantized", ("650M",), DYNAMIC, 1.3, "proteins", "ours, 8 bits, int8"),
    Target("quantized", ("650M",), BEST[0], 2, "proteins", "ours, 8 bits, int8, groups of 64"),
    Target("quantized", ("650M",), DYNAMIC, 1.3, "proteins", "ours, 8 bits, int8, groups of 64"),
    Target("quantized", ("650M", "tiny"), OURS, 0.9, "proteins", "ours, 4 bits"),
    Target("quantized", ("650M", "tiny"), OURS, 1, "64 residues", "ours, 4 bits"),
    Target("memory", ("650M", "tiny"), "transformers", 1),
)
OF_A_PRECISION = {"residues": "ms", "weights": "GB", "peak memory": "GB"}  # of the workload `quantized`
AGAINST = {"": "best peer", "transformers": "transformers at its best", "gemm": "the machine's gemm"}


class Grid(NamedTuple):
    """A table of the report: its title, column headings and rows of cells."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def machine() -> dict[str, Any]:
    """Describe the machine, the commit and the installed packages."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "commit": commit(),
        "CPU": cpu_model(),
        "cores": len(cores()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "OS": platform.platform(),
        "load average": f"{os.getloadavg()[0]:.1f}",
        "Python": platform.python_version(),
        "packages": {package: installed(package) for package in PACKAGES},
    }


def installed(package: str) -> str:
    """Return the installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    """Return the name of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """Return the current commit, and whether there are uncommitted changes."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short", "HEAD").strip() + (" and changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def in_unit(value: float, unit: str) -> float:
    """Convert a value from work per second or bytes to the unit shown."""
    if unit in ("ms", "s"):
        return (1000 if unit == "ms" else 1) / value
    return value / (1e9 if unit in ("GB", "GFLOP/s") else 1)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    values = list(values)
    return {"median": median(values), "min": min(values), "max": max(values)}


def entries(results: list[Result]) -> list[dict[str, Any]]:
    """Return the ratio and figures of each peer in each case, or the reason why there are none."""
    rows = []
    for result in results:
        for name in [*result.names(), *result.absent]:
            row = {**where(result), "peer": name, "unit": result.unit, "rounds": len(result.values(name))}
            if reason := result.absent.get(name):
                row["reason"] = reason
            else:
                row["figure"] = spread(in_unit(value, result.unit) for value in result.values(name))
                row["ratio"] = spread(result.ratios(name)) if name != OURS else None
                row["deviation"] = result.deviation.get(name)
            rows.append(row)
    return rows


def targets(results: list[Result]) -> list[dict[str, Any]]:
    """Compare results with the targets."""
    rows = []
    for target, result in itertools.product(TARGETS, results):
        if result.workload != target.workload or result.model not in target.models:
            continue
        if not result.case.endswith(target.case):
            continue
        peers = [OURS] if target.against == OURS else result.peers(target.against)
        ratios, at_most = result.ratios(*peers, ours=target.ours), result.unit == "GB"
        row = {**where(result), "ours": target.ours, "against": AGAINST.get(target.against, target.against)}
        row |= {"target": f"{'≤' if at_most else '≥'} {target.bound:.2f}", "ratio": None, "verdict": "no peer"}
        if ratios:
            reached = median(ratios) <= target.bound if at_most else median(ratios) >= target.bound
            row |= {"ratio": spread(ratios), "verdict": "pass" if reached else "short"}
        rows.append(row)
    return rows


def where(result: Result) -> dict[str, Any]:
    """Return the workload, model and case of a result."""
    return {"workload": result.workload, "model": result.model, "case": result.case}


def digits(value: float) -> str:
    """Format a number with three significant digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def cells(values: dict[str, float] | None, unit: str = "") -> tuple[str, str]:
    """Format median and range as two cells of a table."""
    if not values:
        return "", ""
    form = digits if unit else "{:.2f}".format
    return f"{form(values['median'])} {unit}".strip(), f"{form(values['min'])} .. {form(values['max'])}"


def grids(rows: list[dict[str, Any]], goals: list[dict[str, Any]]) -> list[Grid]:
    """Return the tables of a run."""

    def place(row: dict[str, Any]) -> str:
        return f"{row['workload']} {row['model']}, {row['case']}"

    measured = []
    for row in (row for row in rows if row["workload"] != "gemm"):
        figures = cells(row.get("figure"), row["unit"])
        if "reason" in row:
            figures = row["reason"].splitlines()[0], ""
        measured.append((place(row), row["peer"], *cells(row.get("ratio")), *figures, str(row["rounds"])))
    reached = [(place(g), g["ours"], g["against"], *cells(g["ratio"]), g["target"], g["verdict"]) for g in goals]
    ratio, figure = ("ours ÷ peer", "min .. max"), ("median", "min .. max")
    found = [
        Grid("Measurements: ratios of speed, or of bytes", ("workload", "peer", *ratio, *figure, "rounds"), measured),
        Grid("Targets", ("workload", "ours", "peer", *ratio, "target", ""), reached),
        *products([row for row in rows if row["workload"] == "gemm"]),
        *precisions([row for row in rows if row["workload"] == "quantized"]),
    ]
    return [grid for grid in found if grid.rows]


def products(rows: list[dict[str, Any]]) -> list[Grid]:
    """Return a table of the workload `gemm` with a line for each product."""
    peaks = [row["figure"]["max"] for row in rows if row["peer"] == PEAK and "figure" in row]
    if not peaks:
        return []
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        values = row.get("figure")
        shown = row.get("reason", "").partition("\n")[0]
        if values:
            shown = f"{values['median']:.0f}, {values['max']:.0f}, {values['max'] / max(peaks):.0%}"
        lines.setdefault((row["model"], row["case"]), {})[row["peer"]] = shown
    title = f"Matrix products in GFLOP/s: median, best, and the best's share of the FMA loop's best, {max(peaks):.0f}"
    body = [(*place, *(line.get(peer, "") for peer in peers)) for place, line in lines.items()]
    return [Grid(title, ("layers of", "tokens x inputs x outputs", *peers), body)]


def precisions(rows: list[dict[str, Any]]) -> list[Grid]:
    """Return a table of the workload `quantized` with a line for each model in each precision."""
    figures = {(row["model"], row["peer"], row["case"].lstrip("0123456789 ")): row for row in rows if "figure" in row}

    def value(model: str, peer: str, case: str) -> float:
        row = figures.get((model, peer, case))
        return row["figure"]["median"] if row else math.nan

    body = []
    for model, peer in dict.fromkeys((row["model"], row["peer"]) for row in rows):
        speed = value(model, peer, "proteins")
        against = (f"{speed / value(model, other, 'proteins'):.2f}" for other in (BEST[0], DYNAMIC))
        others = (f"{digits(value(model, peer, case))} {unit}" for case, unit in OF_A_PRECISION.items())
        body.append((model, peer, digits(speed), *against, *others))
    columns = ("residues/s", "÷ transformers float32", f"÷ {DYNAMIC}", "64 residues", "weights", "peak memory")
    return [Grid("Precisions: medians", ("model", "peer", *columns), body)]


def draw(grid: Grid) -> Table:
    """Return a table for the terminal."""
    table = Table(*grid.columns, title=grid.title)
    for before, row in zip([None, *grid.rows], grid.rows, strict=False):
        if before and before[0] != row[0]:
            table.add_section()
        table.add_row(*row)
    return table


def markdown(about: dict[str, Any], grids: list[Grid]) -> str:
    """Return the description of the machine and all tables as markdown."""
    lines = [f"# Benchmarks of {about['date'][:10]}", ""]
    for key, value in about.items():
        if isinstance(value, dict):
            value = "; ".join(
                f"{name} {', '.join(f'{k} {v}' for k, v in item.items()) if isinstance(item, dict) else item}"
                for name, item in value.items()
            )
        lines.append(f"- {key}: {value}")
    for grid in reversed(grids):
        lines += ["", f"## {grid.title}", "", f"| {' | '.join(grid.columns)} |", "|---" * len(grid.columns) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in grid.rows]
    return "\n".join(lines) + "\n"
