"""What the jobs on proteins have in common: read, check, compute in chunks, write, and say what was left out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_esm_hf.data.proteins import Protein, Report, Source, is_stdin, read_proteins
from mlx_esm_hf.pipelines.model import Loaded
from mlx_esm_hf.runs.formats import require, write_whole
from mlx_esm_hf.runs.run import (
    Arrays,
    Done,
    Item,
    Record,
    Run,
    describe,
    discard,
    shards_of,
    stream,
    wait_for_all,
)

Progress = Callable[[Done], None]
Write = Callable[[Path, Run], None]


class Cost(NamedTuple):
    """What a protein of so many residues takes: tokens through the model, and bytes of results."""

    work: Callable[[int], int]
    size: Callable[[int], int]


@dataclass
class Job:
    """One of the jobs, with the model and the settings it was asked with.

    Args:
        command: its name.
        settings: what results depend on, besides the model.
        compute: the results of items, whose content are token ids, without <cls> and <eos>.
        check: refuses a protein, by ValueError, that this job has nothing to do for.
        copies: how many records a protein gives.
        input: what the manifest says of the input; by default what `describe` does.
        formats: what writes the results, by the suffix of the output; "" leaves the folder of shards.
        aligned, strict: how proteins are read.
    """

    command: str
    model: Loaded
    settings: dict[str, Any]
    compute: Callable[[Sequence[Item]], Sequence[Arrays]]
    cost: Cost
    formats: Mapping[str, Write | None]
    check: Callable[[np.ndarray], None] = lambda ids: None
    aligned: bool = False
    strict: bool = False
    copies: int = 1
    input: dict[str, str] | None = None
    report: Report = field(default_factory=Report)

    def run(
        self, source: Source, output: str | os.PathLike[str] | None, progress: Progress
    ) -> Iterator[Record] | Report:
        """Without an output the results, in the order of the proteins, computed while they are read; with one, a
        report of what was changed and left out.

        Raises:
            ValueError: input that cannot be read; proteins that are too long, of a file all of them, before any work.
        """
        if output is None:
            return self._stream(source)
        self._write(source, Path(output), progress)
        return self.report

    def _stream(self, source: Source) -> Iterator[Record]:
        self._survey(source)
        self.report = Report(self.strict)
        yield from stream(self._items(source), self.model.batch_tokens, self.compute)
        for message in self.report.left_out:
            warnings.warn(f"left out: {message}", stacklevel=2)

    def _write(self, source: Source, output: Path, progress: Progress) -> None:
        write = self.formats[output.suffix]
        folder = shards_of(output) if write else output
        if mx.distributed.init().size() > 1 and is_stdin(source):
            raise ValueError("Several ranks cannot share standard input: give them a file.")
        total = self._survey(source)
        self.report = Report(self.strict)
        settings = self.model.settings | self.settings | {"aligned": self.aligned}
        run = Run(folder, self.command, settings, self.input or describe(source))
        if write and output.exists() and not run.complete:
            raise ValueError(f"{output} is there already, and {folder} is not done: move the file away, then go on.")
        if run.complete:
            self.report.left_out = run.manifest.get("left_out", [])
        else:
            items = self._items(source)
            run.compute(items, self.model.batch_tokens, self.compute, progress, total, self.report)
        if write and run.first_rank:
            if not output.exists():  # else the run was stopped between this and the next line
                write_whole(output, lambda part: write(part, run))
            discard(folder)
        wait_for_all()

    def _items(self, source: Source) -> Iterator[Item]:
        before, after = len(self.model.before), len(self.model.after)
        number = 0
        for protein, ids, problem in self._encoded(source, self.report):
            if problem:
                raise ValueError(problem)
            spans = self.model.spans(0, len(ids))
            work = sum(self.cost.work(span.stop - span.start + before + after) for span in spans)
            for _ in range(self.copies):
                yield Item(number, protein.id, ids, len(ids), work, self.cost.size(len(ids)))
                number += 1

    def _encoded(self, source: Source, report: Report) -> Iterator[tuple[Protein, np.ndarray, str]]:
        """The proteins that have work for this job, with their ids, and what is wrong if one is too long."""
        for protein in read_proteins(source, self.aligned, report):
            try:
                ids = self.model.ids(protein.sequence)
            except ValueError as error:
                report.leave_out(f"{protein.place}: {protein.id!r} {error}.")
                continue
            try:
                ids, problem = self.model.fit(ids), ""
            except ValueError as error:
                problem = f"{protein.place}: {protein.id!r} {error}."
            try:
                self.check(ids)
            except ValueError as error:
                report.leave_out(f"{protein.place}: {protein.id!r} {error}.")
                continue
            yield protein, ids, problem

    def _survey(self, source: Source) -> int | None:
        """Read a file once before the work; returns how many residues there are to compute, None if that would use up
        the source."""
        if is_stdin(source) or not isinstance(source, (str, os.PathLike)):
            return None
        total, problems, report = 0, list[str](), Report(self.strict)
        for _, ids, problem in self._encoded(source, report):
            total += len(ids) * self.copies
            problems += [problem] * bool(problem)
        if problems:
            shown = "\n".join(problems[:20]) + (f"\nand {len(problems) - 20} more." if len(problems) > 20 else "")
            raise ValueError(f"{source}: nothing was computed.\n{shown}")
        if not total:
            raise ValueError("\n".join([f"{source} holds no proteins.", *report.left_out]))
        return total


def check_output(output: str | os.PathLike[str] | None, suffixes: Iterable[str]) -> None:
    """Refuse an output that cannot be written, before a model is loaded for it.

    Raises:
        ValueError: no format has this suffix, its library is not installed, its folder is missing, or it is there.
    """
    if output is None:
        return
    path = Path(output)
    if path.suffix not in suffixes:
        known = ", ".join(suffix or "none, a folder of shards" for suffix in suffixes)
        raise ValueError(f"{output}: the formats of this command are told by the suffixes {known}.")
    require(path)
    if path.suffix and path.exists() and not shards_of(path).exists():
        raise ValueError(f"{output} is there already: choose another output, or remove it.")


def no_progress(done: Done) -> None:
    pass
