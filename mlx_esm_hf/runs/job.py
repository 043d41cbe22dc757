"""A job: items, a function that computes their results, and what the results depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

Arrays = dict[str, np.ndarray]


class Item(NamedTuple):
    """What one result is computed from.

    Attributes:
        number: its place among all items, from 0.
        id: the id of its result.
        content: what `Job.compute` needs.
        length: residues.
        work: cost of computing it, in units chosen by the job.
        size: bytes of its result, at most.
        name: name of its files without suffix, different for each item; "" if it has none.
    """

    number: int
    id: str
    content: Any
    length: int
    work: int
    size: int
    name: str = ""


class Chunk(NamedTuple):
    """Items that are computed together."""

    number: int
    items: list[Item]


class Result(NamedTuple):
    """What was computed for one item.

    Attributes:
        number: the place of the item among all items, from 0.
        id: the id of the item.
        length: residues.
        arrays: {name: array}.
        name: name of the item's files without suffix; "" if it has none.
    """

    number: int
    id: str
    length: int
    arrays: Arrays
    name: str = ""

    def __repr__(self) -> str:
        arrays = ", ".join(f"{name!r}: {x.dtype}{list(x.shape)}" for name, x in self.arrays.items())
        return f"Result(number={self.number}, id={self.id!r}, length={self.length}, arrays={{{arrays}}})"


# {file name: function that makes the file's bytes from a result}
Files = Mapping[str, Callable[[Result], bytes]]


LOADING, COMPUTING, WRITING = "loading", "computing", "writing"


class Progress(NamedTuple):
    """A step of a job, or the beginning of one of its phases. All counts are residues.

    Attributes:
        residues_done: finished in this step, computed or found on disk.
        residues_computed: those of them that were computed.
        residues_total: of all items; None if unknown.
        doing: what the job is doing within a step, or in the phase that begins.
        phase: LOADING (the model and the input), COMPUTING or WRITING if this phase begins, with nothing done yet; ""
            for a step. A phase may begin several times.
        seconds: how long the computed residues took.
    """

    residues_done: int
    residues_computed: int
    residues_total: int | None
    doing: str = ""
    phase: str = ""
    seconds: float = 0.0


def begin(phase: str, doing: str = "", residues_total: int | None = None) -> Progress:
    """Return the beginning of a phase."""
    return Progress(0, 0, residues_total, doing, phase)


OnProgress = Callable[[Progress], None]


def no_progress(progress: Progress) -> None:
    """Ignore progress."""


class Bar:
    """A progress bar of residues, in a notebook or on a terminal."""

    def __init__(self) -> None:
        self.bar: Any = None

    def __call__(self, progress: Progress) -> None:
        """Advance the bar. A new phase, or the step after the total is reached, opens another."""
        from tqdm.auto import tqdm

        if progress.phase and self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.bar is None:
            self.bar = tqdm(total=progress.residues_total, unit=" residues", unit_scale=True)
        self.bar.total = progress.residues_total or self.bar.total
        self.bar.set_postfix_str(progress.doing, refresh=False)
        self.bar.update(progress.residues_done)
        self.bar.refresh()
        if self.bar.n == self.bar.total:
            self.bar.close()
            self.bar = None


def as_on_progress(progress: OnProgress | bool) -> OnProgress:
    """Return the function to call after each step: a new bar for True, one that does nothing for False."""
    if isinstance(progress, bool):
        return Bar() if progress else no_progress
    return progress


def no_files(item: Item) -> Files:
    """Return no files, for a job whose results are only in its shards."""
    return {}


def no_cause(content: Any) -> str:
    """Return "": the cause is unknown."""
    return ""


class Items(Protocol):
    """The items of a job. Iterating reads them from the beginning, always the same items in the same order."""

    @property
    def left_out(self) -> list[str]:
        """A message for each part of the input that is not an item. It fills while the items are read."""

    def __iter__(self) -> Iterator[Item]: ...

    @property
    def total(self) -> int | None:
        """The residues of all items; None if unknown."""

    @property
    def input(self) -> dict[str, str]:
        """The description of the input for the manifest. A run can be resumed if it has a "sha256"."""

    def has_changed(self) -> bool:
        """Return whether the input has changed while it was read."""


@dataclass
class ItemList:
    """Items that are in memory.

    Attributes:
        items: the items.
        input: the description of the input for the manifest.
        left_out: see `Items`.
    """

    items: list[Item]
    input: dict[str, str]
    left_out: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @property
    def total(self) -> int:
        """The residues of all items."""
        return sum(item.length for item in self.items)

    def has_changed(self) -> bool:
        """Return False, as items in memory do not change."""
        return False


@dataclass
class Job:
    """Items, a function that computes their results, and what the results depend on.

    Attributes:
        command: name of the job.
        settings: what the results depend on besides the items, for the manifest.
        items: the items.
        compute: returns the arrays of each of some items. It may raise NonFiniteError; a result that is infinite or NaN
            is refused in any case.
        chunk_work: maximum work of a chunk, in units of `Item.work`.
        files: returns the files of an item that a folder of shards also contains.
        columns: returns additional columns of the index for a result; None for none.
        cause: returns why the result of an item, given by its content, is NaN or infinite, and what to do about it.
    """

    command: str
    settings: dict[str, Any]
    items: Items
    compute: Callable[[Sequence[Item]], Sequence[Arrays]]
    chunk_work: int
    files: Callable[[Item], Files] = no_files
    columns: Callable[[Result], dict[str, Any]] | None = None
    cause: Callable[[Any], str] = no_cause
