"""What a run computes: items, chunk by chunk, into results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

CHUNK_BYTES = 1 << 28  # of results, which are in memory until they are written

Arrays = dict[str, np.ndarray]


class Item(NamedTuple):
    """What one result is computed from."""

    number: int
    id: str
    content: Any
    length: int  # residues
    work: int  # in units of the job's own
    size: int  # bytes of its results
    name: str = ""  # of its files, where it has any: no other item's


class Chunk(NamedTuple):
    """Items that are computed together."""

    number: int
    items: list[Item]


class Result(NamedTuple):
    """What was computed of one item."""

    number: int
    id: str
    length: int
    arrays: Arrays
    name: str = ""


# Files by their names, and what makes their bytes of a result.
Files = Mapping[str, Callable[[Result], bytes]]


class Progress(NamedTuple):
    """What is told after each step, in residues: those that are done now, those of them just computed, those of all.
    Within a step, what is being done."""

    residues: int
    computed: int
    total: int | None
    doing: str = ""


OnProgress = Callable[[Progress], None]


def no_progress(progress: Progress) -> None:
    """Tell nobody."""


def always() -> bool:
    return True


def no_files(item: Item) -> Files:
    """The files of a job whose results are in its shards alone."""
    return {}


@dataclass
class Job:
    """Items, a function that computes them, and what their results depend on.

    Args:
        command: its name.
        settings: what the results depend on, besides the input.
        input: what the manifest says of the input. With a "sha256" the run can be taken up again.
        items: reads the items from the beginning, in order; always the same ones.
        compute: the arrays of each of some items.
        chunk_work: how much work makes a chunk.
        total: residues of all items, if that is known.
        left_out: what could not be made an item, and why; it fills while items are read.
        input_is_same: whether the input still is what `input` says; asked when all items are computed.
        files: what a folder holds of an item beside the shards, made of its result.
        columns: what the index says of a result, besides where it is; None, nothing.
    """

    command: str
    settings: dict[str, Any]
    input: dict[str, str]
    items: Callable[[], Iterable[Item]]
    compute: Callable[[Sequence[Item]], Sequence[Arrays]]
    chunk_work: int
    total: int | None = None
    left_out: list[str] = field(default_factory=list)
    input_is_same: Callable[[], bool] = always
    files: Callable[[Item], Files] = no_files
    columns: Callable[[Result], dict[str, Any]] | None = None


def chunks(items: Iterable[Item], chunk_work: int) -> Iterator[Chunk]:
    """The items in order, as many at a time as make so much work, or fill `CHUNK_BYTES`."""
    chunk: list[Item] = []
    number = work = size = 0
    for item in items:
        if chunk and (work + item.work > chunk_work or size + item.size > CHUNK_BYTES):
            yield Chunk(number, chunk)
            number, chunk, work, size = number + 1, [], 0, 0
        chunk.append(item)
        work, size = work + item.work, size + item.size
    if chunk:
        yield Chunk(number, chunk)


def stream(job: Job) -> Iterator[Result]:
    """The results in order, computed chunk by chunk while the items are read, and written nowhere."""
    for chunk in chunks(job.items(), job.chunk_work):
        for item, arrays in zip(chunk.items, job.compute(chunk.items), strict=True):
            yield Result(item.number, item.id, item.length, arrays, item.name)
