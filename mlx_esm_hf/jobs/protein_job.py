"""What the jobs on proteins share: turning proteins into items, and limiting them to the free memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlx_esm_hf.data.proteins import Report, clean
from mlx_esm_hf.data.source import Cleaner, ProteinSource
from mlx_esm_hf.errors import UserError, quoted
from mlx_esm_hf.runs.ids import FileNames, Ids, UniqueIds
from mlx_esm_hf.runs.job import (
    LOADING,
    Item,
    Job,
    OnProgress,
    Progress,
    Result,
    as_on_progress,
    begin,
    no_progress,
)
from mlx_esm_hf.runs.outputs import earlier_settings, refuse_other_run
from mlx_esm_hf.runs.run import WriteRun, stream, write_results
from mlx_esm_hf.runtime import distributed, memory

NO_LIMIT = (1 << 31) - 1  # MiB
REPORTED = 1000  # proteins are read between two reports of progress
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


class LoadedLater(Model, Protocol):
    """What `load_checked` needs to know of a model; see `ProteinModel`."""

    name: str

    @property
    def known_settings(self) -> dict[str, Any]:
        """The settings that do not depend on the weights."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that results depend on."""

    def load(self) -> None:
        """Load the weights."""


class ProteinItems:
    """The proteins of a source as items of a job: encoded and checked.

    Args:
        source: where the proteins come from.
        model: encodes them.
        result_bytes: bytes of the result of a protein with so many positions.
        output: the file or folder that the results are for; None for none.
        work: work of a window with so many tokens.
        check: raises UserError for ids that the job cannot use.
        lacks: what a protein that `check` refuses lacks, such as `<mask>`; "" if the reasons differ.
        copies: number of results for each protein.
        has_files: whether each item has files of its own, and so needs a name for them.
        strict: raise an error for a bad record instead of leaving it out.
        clean: cleans a sequence; by default a protein.

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
        lacks: str = "",
        copies: int = 1,
        has_files: bool = False,
        strict: bool = False,
        clean: Cleaner = clean,
    ) -> None:
        self.source, self.has_changed = source, source.has_changed
        self.model, self.result_bytes = model, result_bytes
        self.suffix = None if output is None else Path(output).suffix
        self.work, self.checks, self.lacks, self.copies = work, [check], lacks, copies
        self.has_files, self.clean = has_files, clean
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
        described = {"name": name} if sha256 is None else {"name": name, "sha256": sha256}
        structures = self.source.structures
        return described if structures is None else described | {"structure": structures.sha256}

    def add_check(self, check: Callable[[np.ndarray], None]) -> None:
        """Also leave out the proteins that `check` refuses, and survey the rest."""
        self.checks.append(check)
        self.survey()

    def survey(self, on_progress: OnProgress = no_progress) -> None:
        """Read a file once before the work, to check all its proteins and count their residues.

        Args:
            on_progress: called while it is read.

        Raises:
            UserError: the file contains no proteins for this job, or proteins that are too long (all are named).
        """
        if not self.source.can_reread:
            return
        report, too_long = Report(self.report.strict), list[str]()
        on_progress(begin(LOADING, f"reading {self.source.name}"))
        total = reported = 0
        for number, item in enumerate(self._read(report, too_long), 1):
            total += item.length
            if number % REPORTED == 0:
                on_progress(Progress(total - reported, 0, None, f"reading {self.source.name}: {number:,} proteins"))
                reported = total
        self.total = total
        if too_long:
            more = f"\nand {len(too_long) - 20} more." if len(too_long) > 20 else ""
            raise UserError(f"{self.source.path}: nothing was computed.\n" + "\n".join(too_long[:20]) + more)
        if not self.total:
            reasons = [message for message in report.left_out if not self.lacks or self.lacks not in message]
            if self.lacks and not reasons:
                raise UserError(f"No sequence in {self.source.path} contains `{self.lacks}`.")
            lines = [f"{self.source.path} contains no proteins for this job.", *reasons[:10]]
            if len(reasons) > 10:
                lines.append(f"and {len(reasons) - 10} more.")
            raise UserError("\n".join(lines))

    def __iter__(self) -> Iterator[Item]:
        return self._read(self.report)

    def _read(self, report: Report, too_long: list[str] | None = None) -> Iterator[Item]:
        """Yield the items; proteins that this job cannot use are left out.

        Repeated ids are numbered before anything is left out, so that all jobs call a record the same.

        Args:
            report: takes what was changed and left out.
            too_long: takes a message for each protein that is too long; None raises the first one as an error.
        """
        number = 0
        ids_of_file = None if self.suffix is None else Ids(self.suffix)
        file_names, unique = FileNames() if self.has_files else None, UniqueIds()
        for protein in self.source.read(report, unique.name, self.clean):
            report.renamed = unique.renamed
            try:
                if ids_of_file is not None:
                    ids_of_file.refuse(protein.id)
                ids = self.model.encode(protein.sequence)
                for check in self.checks:
                    check(ids)
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


def load_checked(
    model: LoadedLater,
    command: str,
    settings: dict[str, Any],
    items: ProteinItems,
    output: str | os.PathLike[str] | None,
    progress: OnProgress | bool,
) -> dict[str, Any]:
    """Load the weights of a model after checking all that can be checked without them.

    Args:
        model: the model.
        command: name of the job.
        settings: the settings of the job.
        items: its items.
        output: a file or folder; None for none.
        progress: called while the items are read, and when the weights are loaded. A bar (True) begins later.

    Returns:
        The settings of the model and the job, for the manifest.

    Raises:
        UserError: see `ProteinItems.survey` and `refuse_other_run`, and several ranks would share a stream.
    """
    if output is not None and items.source.is_stream and distributed.size() > 1:
        raise UserError(f"Several ranks cannot share {items.source.name}, which can be read only once. Use a file.")
    on_progress = no_progress if isinstance(progress, bool) else progress
    items.survey(on_progress)
    known = model.known_settings | settings
    distributed.on_rank_0(lambda: refuse_other_run(output, command, known, items.input))
    on_progress(begin(LOADING, f"loading {model.name}"))
    model.load()
    return model.settings | settings


def run_job(
    job: Job,
    items: ProteinItems,
    output: str | os.PathLike[str] | None,
    writers: Mapping[str, WriteRun | None],
    progress: OnProgress | bool,
    others: Mapping[Path, WriteRun] | None = None,
) -> Iterator[Result] | Report:
    """Stream the results of a job, or write them.

    Args:
        job: the job.
        items: its items.
        output: a file or folder; None streams the results.
        writers: see `write_results`.
        progress: called after each step; True shows a progress bar.
        others: see `write_results`.

    Returns:
        An iterator over results; with an output, a report of what was changed and left out.

    Raises:
        UserError: see `write_results`.
    """
    on_progress = as_on_progress(progress)
    if output is None:
        return stream(job, on_progress)
    write_results(job, Path(output), writers, on_progress, others)
    return items.report


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
