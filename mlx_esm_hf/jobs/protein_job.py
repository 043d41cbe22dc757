"""What the jobs on proteins have in common: read, check, compute in chunks, write, and say what was left out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlx_esm_hf.data.proteins import Protein, Report, Source, is_stdin, is_stream, quoted, read_proteins, standard_input
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runs.ids import FileNames, Ids
from mlx_esm_hf.runs.job import Arrays, Files, Item, Job, OnProgress, Result, no_files, stream
from mlx_esm_hf.runs.outputs import claimed, earlier_settings, shards_of, write_files
from mlx_esm_hf.runs.run import Run, compute_run, sha256_of
from mlx_esm_hf.runtime import distributed, memory

CHUNK_BATCHES = 16  # of a chunk: enough to order by length
NO_LIMIT = (1 << 31) - 1  # MiB
ID_BYTES = 40  # of each character of an id, so that the ids of a chunk fit into the header of its shard

WriteRun = Callable[[Path, Run], None]


def any_protein(ids: np.ndarray) -> None:
    """The check of a job that has something to do for every protein."""


def one_pass_work(tokens: int) -> int:
    """The work of a job that takes one pass: all tokens once."""
    return tokens


class Model(Protocol):
    """What a job has to know of its model; see `ProteinModel`."""

    batch_tokens: int

    @property
    def settings(self) -> dict[str, Any]: ...

    def encode(self, sequence: str) -> np.ndarray: ...

    def passes(self, ids: np.ndarray) -> list[int]: ...

    def residues(self, ids: np.ndarray) -> int: ...

    def refuse_long(self, length: int) -> None: ...


@dataclass
class ProteinJob:
    """A job whose items are proteins.

    Args:
        command: its name.
        model: that it asks.
        settings: what results depend on, besides the model.
        compute: the results of items, whose contents are sequences of ids.
        size: bytes of the results of a protein of so many residues.
        work: for a window of so many tokens, by default those that go through the model.
        check: refuses a sequence of ids, by ValueError, that this job has nothing to do for.
        copies: how many results a protein gives.
        input: what the manifest says of the input; by default what `describe` does.
        aligned, strict: how proteins are read.
        arrays: of each result, those that have a name of their own in a file; 0 where all make one matrix.
        chains: a protein may have several.
        chunk_work: of a chunk; 0, that of `CHUNK_BATCHES`.
        files, columns: what a folder of shards has besides; see `Job`.
    """

    command: str
    model: Model
    settings: dict[str, Any]
    compute: Callable[[Sequence[Item]], Sequence[Arrays]]
    size: Callable[[int], int]
    work: Callable[[int], int] = one_pass_work
    check: Callable[[np.ndarray], None] = any_protein
    copies: int = 1
    input: dict[str, str] | None = None
    aligned: bool = False
    strict: bool = False
    arrays: int = 0
    chains: bool = False
    chunk_work: int = 0
    files: Callable[[Item], Files] = no_files
    columns: Callable[[Result], dict[str, Any]] | None = None

    def stream(self, source: Source) -> Iterator[Result]:
        """The results in the order of the proteins, computed while they are read. Warns of what was left out.

        Raises:
            ValueError: input that cannot be read; a protein that is too long, of a file all of them, before any work.
        """
        self._survey(source, None)
        report = Report(self.strict)
        yield from stream(self._job(source, {}, report, None, None))
        for message in report.left_out:
            warnings.warn(f"left out: {message}", stacklevel=2)

    def write(
        self,
        source: Source,
        output: Path,
        formats: Mapping[str, WriteRun | None],
        on_progress: OnProgress,
        others: Mapping[Path, WriteRun] | None = None,
    ) -> Report:
        """Write the results; returns what was changed and left out.

        Args:
            output: a file, or a folder of shards.
            formats: what writes a file, by its suffix; None leaves the folder of shards.
            others: files to be written beside it, and what writes them.

        Raises:
            ValueError: as `stream`; a folder that holds something else.
            OSError: what cannot be written.
        """
        if distributed.size() > 1 and is_stream(source):
            raise UserError(f"Several ranks cannot share what is read only once, {source}: give them a file.")
        total = self._survey(source, output.suffix)
        report = Report(self.strict)
        job = self._job(source, self.input or describe(source), report, total, output.suffix)
        if self.input is None:
            job.input_is_same = lambda: describe(source) == job.input
        writer = formats[output.suffix]
        others = others or {}
        with claimed(output, others):
            if writer is None:
                compute_run(job, output, on_progress)
                return report
            run = compute_run(job, shards_of(output), on_progress)
            files = {path: writing(write, run) for path, write in {**others, output: writer}.items()}
            distributed.on_rank_0(lambda: write_files(files, run.folder))
        return report

    def _job(self, source: Source, input: dict[str, str], report: Report, total: int | None, suffix: str | None) -> Job:
        return Job(
            command=self.command,
            settings=self.model.settings | self.settings | {"aligned": self.aligned},
            input=input,
            items=lambda: self._items(source, report, suffix),
            compute=self.compute,
            chunk_work=self.chunk_work or CHUNK_BATCHES * self.model.batch_tokens,
            total=total,
            left_out=report.left_out,
            files=self.files,
            columns=self.columns,
        )

    def _items(self, source: Source, report: Report, suffix: str | None) -> Iterator[Item]:
        number, names = 0, None if self.files is no_files else FileNames()
        for protein, ids in self._read(source, report, suffix):
            self._refuse(protein, ids)
            work = sum(self.work(tokens) for tokens in self.model.passes(ids))
            size = self.size(len(ids)) + ID_BYTES * len(protein.id)
            for _ in range(self.copies):
                name = "" if names is None else names.name(protein.id)
                yield Item(number, protein.id, ids, self.model.residues(ids), work, size, name)
                number += 1

    def _read(self, source: Source, report: Report, suffix: str | None) -> Iterator[tuple[Protein, np.ndarray]]:
        """The proteins that have work for this job, with their ids; the others are left to the report.

        Args:
            suffix: of the file that is to hold the results; None, there is none.
        """
        names = Ids(suffix or "", self.arrays)
        for protein in read_proteins(source, self.aligned, report, self.chains):
            try:
                if suffix is not None:
                    names.refuse(protein.id)
                ids = self.model.encode(protein.sequence)
                self.check(ids)
            except ValueError as error:
                report.leave_out(f"{protein.place}: {quoted(protein.id)} {error}.")
                continue
            if suffix is not None:
                names.add(protein.id)
            yield protein, ids

    def _refuse(self, protein: Protein, ids: np.ndarray) -> None:
        """
        Raises:
            ValueError: a protein that is too long, if that is to be an error.
        """
        try:
            self.model.refuse_long(len(ids))
        except ValueError as error:
            raise UserError(f"{protein.place}: {quoted(protein.id)} {error}.") from None

    def _survey(self, source: Source, suffix: str | None) -> int | None:
        """Read a file once before the work; returns how many residues there are to compute, None if that would use up
        the source."""
        if is_stdin(source):
            standard_input()
        if is_stream(source) or not isinstance(source, (str, os.PathLike)):
            return None
        total, problems, report = 0, list[str](), Report(self.strict)
        for protein, ids in self._read(source, report, suffix):
            total += self.model.residues(ids) * self.copies
            try:
                self._refuse(protein, ids)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            shown = "\n".join(problems[:20]) + (f"\nand {len(problems) - 20} more." if len(problems) > 20 else "")
            raise UserError(f"{source}: nothing was computed.\n{shown}")
        if not total:
            raise UserError("\n".join([f"{source} holds no proteins.", *report.left_out]))
        return total


class Room:
    """The memory that there is for a protein.

    In a run that goes on it is that which was free when the run began: which proteins there is room for must not
    change within a run, since it decides how results are counted.

    Args:
        output: of the run.
        needed: an upper bound of its bytes for the ids of a protein.
    """

    def __init__(self, output: str | os.PathLike[str] | None, needed: Callable[[np.ndarray], int]):
        self.needed = needed
        self.free = memory.free_memory() // distributed.size()
        earlier = earlier_settings(output).get("memory")
        # The ranks have to leave out the same proteins, and those that do not write may not see the output.
        known = distributed.all_min(NO_LIMIT if earlier is None else earlier)
        self.mebibytes = distributed.all_min(self.free >> 20) if known == NO_LIMIT else known

    @property
    def bytes(self) -> int:
        """How much there is."""
        return self.mebibytes << 20

    def check(self, ids: np.ndarray) -> None:
        """
        Raises:
            ValueError: there is too little for this protein.
        """
        needed = self.needed(ids)
        if needed > self.bytes:
            raise UserError(
                f"has {len(ids)} residues, which need {needed / 1e9:.2f} GB of memory; there are "
                f"{self.bytes / 1e9:.2f} GB free"
            )

    def confirm(self, items: Sequence[Item]) -> None:
        """
        Raises:
            ValueError: of a run that was begun with more, a protein for which there is too little now.
        """
        for item in items:
            needed = self.needed(item.content)
            if needed > self.free:
                raise UserError(
                    f"{quoted(item.id)} needs {needed / 1e9:.2f} GB of memory. When this run began "
                    f"{self.bytes / 1e9:.2f} GB were free, now {self.free / 1e9:.2f} are: free some, then go on."
                )


def describe(source: Source) -> dict[str, str]:
    """The input of a run for its manifest: a file by its name and its hash, which is that of what was compressed."""
    if not isinstance(source, (str, os.PathLike)):
        return {"name": "Python"}
    if is_stream(source):
        return {"name": os.fspath(source)}
    return {"name": os.path.basename(source), "sha256": sha256_of(source)}


def writing(write: WriteRun, run: Run) -> Callable[[Path], None]:
    """What writes this run."""
    return lambda path: write(path, run)
