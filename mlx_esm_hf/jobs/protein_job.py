"""What the jobs on proteins share: turning proteins into items, and limiting them to the free memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mlx_esm_hf.data.proteins import Report, quoted
from mlx_esm_hf.data.source import ProteinSource
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runs.ids import FileNames, Ids
from mlx_esm_hf.runs.job import Item, Job, OnProgress, Result
from mlx_esm_hf.runs.outputs import earlier_settings
from mlx_esm_hf.runs.run import WriteRun, stream, write_results
from mlx_esm_hf.runtime import distributed, memory

NO_LIMIT = (1 << 31) - 1  # MiB
ID_BYTES = 40  # for each character of an id, so that the ids of a chunk fit into the header of its shard


def accept(ids: np.ndarray) -> None:
    """Accept any protein."""


def one_pass_work(window_tokens: int) -> int:
    """Return the work of one pass through a window: its tokens."""
    return window_tokens


class Model(Protocol):
    """What `ProteinItems` needs to know of a model; see `ProteinModel`."""

    def encode(self, sequence: str) -> np.ndarray:
        """Return the ids of a cleaned sequence."""

    def window_tokens(self, ids: np.ndarray) -> list[int]:
        """Return the number of tokens of each window."""

    def num_residues(self, ids: np.ndarray) -> int:
        """Return the number of residues."""

    def refuse_long(self, length: int) -> None:
        """Raise an error if a protein with so many positions is too long."""


class ProteinItems:
    """The proteins of a source as items of a job: encoded and checked.

    Args:
        source: where the proteins come from.
        model: encodes them.
        result_bytes: bytes of the result of a protein with so many positions.
        output: the file or folder that the results are for; None for none.
        work: work of a window with so many tokens.
        check: raises UserError for ids that the job cannot use.
        copies: number of results for each protein.
        arrays: number of arrays of each result that have a name of their own in a file; 0 if all form one matrix.
        has_files: whether each item has files of its own, and so needs a name for them.
        strict: raise an error for a bad record instead of leaving it out.

    Attributes:
        has_changed: tells whether the source has changed while it was read.
        report: what was changed and left out while the items were read.
        total: the residues of all items; None unless `survey` counted them.
    """

    def __init__(
        self,
        source: ProteinSource,
        model: Model,
        result_bytes: Callable[[int], int],
        output: str | os.PathLike[str] | None = None,
        *,
        work: Callable[[int], int] = one_pass_work,
        check: Callable[[np.ndarray], None] = accept,
        copies: int = 1,
        arrays: int = 0,
        has_files: bool = False,
        strict: bool = False,
    ) -> None:
        self.source, self.has_changed = source, source.has_changed
        self.model, self.result_bytes = model, result_bytes
        self.suffix = None if output is None else Path(output).suffix
        self.work, self.check, self.copies = work, check, copies
        self.arrays, self.has_files = arrays, has_files
        self.report = Report(strict)
        self.total: int | None = None

    @property
    def left_out(self) -> list[str]:
        """A message for each protein that was left out."""
        return self.report.left_out

    @property
    def input(self) -> dict[str, str]:
        """Describe the source for the manifest of a run."""
        name, sha256 = self.source.name, self.source.sha256
        return {"name": name} if sha256 is None else {"name": name, "sha256": sha256}

    def survey(self) -> None:
        """Read a file once before the work, to check all its proteins and count their residues.

        Raises:
            UserError: the file contains no proteins for this job, or proteins that are too long (all are named).
        """
        if not self.source.can_reread:
            return
        report, too_long = Report(self.report.strict), list[str]()
        self.total = sum(item.length for item in self._read(report, too_long))
        if too_long:
            more = f"\nand {len(too_long) - 20} more." if len(too_long) > 20 else ""
            raise UserError(f"{self.source.path}: nothing was computed.\n" + "\n".join(too_long[:20]) + more)
        if not self.total:
            raise UserError("\n".join([f"{self.source.path} contains no proteins for this job.", *report.left_out]))

    def __iter__(self) -> Iterator[Item]:
        return self._read(self.report)

    def _read(self, report: Report, too_long: list[str] | None = None) -> Iterator[Item]:
        """Yield the items; proteins that this job cannot use are left out.

        Args:
            report: takes what was changed and left out.
            too_long: takes a message for each protein that is too long; None raises the first one as an error.
        """
        number = 0
        ids_of_file = None if self.suffix is None else Ids(self.suffix, self.arrays)
        file_names = FileNames() if self.has_files else None
        for protein in self.source.read(report):
            try:
                if ids_of_file is not None:
                    ids_of_file.refuse(protein.id)
                ids = self.model.encode(protein.sequence)
                self.check(ids)
            except UserError as error:
                report.leave_out(f"{protein.place}: {quoted(protein.id)} {error}.")
                continue
            if ids_of_file is not None:
                ids_of_file.add(protein.id)
            try:
                self.model.refuse_long(len(ids))
            except UserError as error:
                message = f"{protein.place}: {quoted(protein.id)} {error}."
                if too_long is None:
                    raise UserError(message) from None
                too_long.append(message)
            length = self.model.num_residues(ids)
            work = sum(map(self.work, self.model.window_tokens(ids)))
            size = self.result_bytes(len(ids)) + ID_BYTES * len(protein.id)
            for _ in range(self.copies):
                name = "" if file_names is None else file_names.name(protein.id)
                yield Item(number, protein.id, ids, length, work, size, name)
                number += 1


def run_job(
    job: Job,
    items: ProteinItems,
    output: str | os.PathLike[str] | None,
    writers: Mapping[str, WriteRun | None],
    on_progress: OnProgress,
    others: Mapping[Path, WriteRun] | None = None,
) -> Iterator[Result] | Report:
    """Stream the results of a job, or write them.

    Args:
        job: the job.
        items: its items.
        output: a file or folder; None streams the results.
        writers: see `write_results`.
        on_progress: called after each step.
        others: see `write_results`.

    Returns:
        An iterator over results; with an output, a report of what was changed and left out.

    Raises:
        UserError: see `write_results`, and several ranks would share a stream.
    """
    if output is None:
        return _surveyed_stream(job, items)
    if items.source.is_stream and distributed.size() > 1:
        raise UserError(f"Several ranks cannot share {items.source.name}, which can be read only once. Use a file.")
    items.survey()
    write_results(job, Path(output), writers, on_progress, others)
    return items.report


def _surveyed_stream(job: Job, items: ProteinItems) -> Iterator[Result]:
    items.survey()
    yield from stream(job)


class MemoryLimit:
    """The memory that one protein may need.

    A resumed run keeps the limit of its start: the limit decides which proteins are left out, and so how results are
    numbered.

    Args:
        output: the file or folder of the run; None for none.
        bytes_needed: an upper bound of the bytes that a protein needs, given its ids.

    Attributes:
        mebibytes: the limit, for the manifest.
    """

    def __init__(self, output: str | os.PathLike[str] | None, bytes_needed: Callable[[np.ndarray], int]) -> None:
        self.bytes_needed = bytes_needed
        self.free = memory.free_memory() // distributed.size()
        earlier = earlier_settings(output).get("memory")
        # All ranks must leave out the same proteins, but only rank 0 is certain to see the output.
        known = distributed.all_min(NO_LIMIT if earlier is None else earlier)
        self.mebibytes = distributed.all_min(self.free >> 20) if known == NO_LIMIT else known

    @property
    def bytes(self) -> int:
        """The limit in bytes."""
        return self.mebibytes << 20

    def check(self, ids: np.ndarray) -> None:
        """Refuse a protein that needs more memory than the limit.

        Raises:
            UserError: the protein needs more.
        """
        needed = self.bytes_needed(ids)
        if needed > self.bytes:
            raise UserError(
                f"has {len(ids)} residues, which need {needed / 1e9:.2f} GB of memory; {self.bytes / 1e9:.2f} GB are "
                "free"
            )

    def confirm(self, items: Sequence[Item]) -> None:
        """Check that a resumed run still has the memory for its items.

        Raises:
            UserError: an item needs more memory than is free now.
        """
        for item in items:
            needed = self.bytes_needed(item.content)
            if needed > self.free:
                raise UserError(
                    f"{quoted(item.id)} needs {needed / 1e9:.2f} GB of memory. When this run began, "
                    f"{self.bytes / 1e9:.2f} GB were free; now {self.free / 1e9:.2f} GB are. Free some memory, then "
                    "run again."
                )
