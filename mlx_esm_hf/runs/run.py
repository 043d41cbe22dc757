"""Runs: jobs that write their results while they compute them and resume after a stop.

The input and the settings alone determine the chunks. Each chunk becomes one shard, written atomically, with a
checksum. Starting a run again, finished or not, computes only the shards that are missing or damaged. The manifest
records what the shards were computed with, and a run with other settings is refused. A job may also make files from the
results in a shard.

Several ranks compute one chunk each at a time. Rank 0 gathers their shards and writes them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import compress, islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mlx_esm_hf.errors import NonFiniteError, UserError, quoted
from mlx_esm_hf.runs.job import (
    COMPUTING,
    WRITING,
    Arrays,
    Chunk,
    Files,
    Item,
    Job,
    OnProgress,
    Progress,
    Result,
    begin,
    no_progress,
)
from mlx_esm_hf.runs.manifest import CHECKSUMS, MANIFEST, manifest_of, read_checksums, read_manifest, refuse_another
from mlx_esm_hf.runs.outputs import claimed, refuse_occupied, shards_of, write_files
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.files import RESUME_HINT, Write, remove_all_temporary, replace_file

WriteRun = Callable[[Path, "Run"], None]  # writes a file from a finished run

INDEX = "index.csv"
CHUNK_BYTES = 1 << 28  # of the results of a chunk, which stay in memory until they are written


def chunks(items: Iterable[Item], chunk_work: int) -> Iterator[Chunk]:
    """Yield the items in order, in chunks of at most `chunk_work` work and `CHUNK_BYTES` bytes of results."""
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


def compute_items(job: Job, items: Sequence[Item]) -> Sequence[Arrays]:
    """Compute some items of a job. All results of all jobs pass through here.

    Raises:
        NonFiniteError: a result is infinite or NaN. The message names the item and the cause.
    """
    try:
        results = job.compute(items)
        wrong = [item for item, arrays in zip(items, results, strict=True) if not all_finite(arrays)]
        if not wrong:
            return results
    except NonFiniteError:
        if len(items) > 1:  # alone, an item is known to be the one that fails
            return [arrays for item in items for arrays in compute_items(job, [item])]
        wrong = list(items)
    message = f"The result of {quoted(wrong[0].id)} is NaN or infinite."
    raise NonFiniteError(" ".join(filter(None, [message, job.cause(wrong[0].content)])))


def all_finite(arrays: Arrays) -> bool:
    """Return whether no array has an infinite or NaN element."""
    return all(np.isfinite(array).all() for array in arrays.values())


def stream(job: Job, on_progress: OnProgress = no_progress) -> Iterator[Result]:
    """Yield the results in order, computed chunk by chunk while the items are read, without writing anything.

    Warns about what was left out.

    Args:
        job: the job.
        on_progress: called after each result.
    """
    for chunk in chunks(job.items, job.chunk_work):
        for item, arrays in zip(chunk.items, compute_items(job, chunk.items), strict=True):
            on_progress(Progress(item.length, item.length, job.items.total))
            yield Result(item.number, item.id, item.length, arrays, item.name)
    for message in job.items.left_out:
        warnings.warn(f"left out: {message}", stacklevel=2)


def write_results(
    job: Job,
    output: Path,
    writers: Mapping[str, WriteRun | None],
    on_progress: OnProgress,
    others: Mapping[Path, WriteRun] | None = None,
) -> None:
    """Compute a job and write its results.

    Args:
        job: the job.
        output: a file, or a folder of shards.
        writers: {suffix: function that writes the output}; None keeps the folder of shards as the output.
        on_progress: called after each step.
        others: {path: function that writes it} of files to write besides the output.

    Raises:
        UserError: see `compute_run`, and another process is writing the output.
        OSError: a file cannot be written.
    """
    others, writer = others or {}, writers[output.suffix]
    with claimed(output, others):
        run = compute_run(job, output if writer is None else shards_of(output), on_progress)
        if writer is not None:
            files = {path: _bound(write, run, path.name) for path, write in {**others, output: writer}.items()}
            distributed.on_rank_0(lambda: write_files(files, run.folder))


def _bound(write: WriteRun, run: Run, name: str) -> Write:
    """Return the function that writes a run to a temporary path, and shows the name that the file will have."""

    def write_run(path: Path) -> None:
        run.doing = f"writing {name}"
        write(path, run)

    return write_run


def compute_run(job: Job, folder: Path, on_progress: OnProgress) -> Run:
    """Compute what is missing of a job's run and return the finished run.

    Args:
        job: the job.
        folder: a new folder, or the folder of a run with the same settings and input, which is resumed.
        on_progress: called after each step.

    Raises:
        UserError: there are no items; the folder contains something else, or a run with other settings or input; the
            input changed while it was read.
        OSError: the folder cannot be created or written.
    """
    run = Run(folder, manifest_of(job.command, job.settings, job.items.input))
    run.on_progress, run.total = on_progress, job.items.total
    distributed.on_rank_0(run.open)
    if distributed.all_sum(int(run.finished)):
        job.items.left_out[:] = run.manifest.get("left_out", [])
        return run
    on_progress(begin(COMPUTING, residues_total=job.items.total))
    remaining, items, shards, files = chunks(job.items, job.chunk_work), 0, 0, 0
    while step := list(islice(remaining, distributed.size())):  # one chunk for each rank
        items, shards = items + sum(len(chunk.items) for chunk in step), shards + len(step)
        missing = [not distributed.all_sum(int(distributed.is_rank_0() and run.has(chunk))) for chunk in step]
        data, began = b"", time.perf_counter()
        if distributed.rank() < len(step) and missing[distributed.rank()]:
            chunk = step[distributed.rank()]
            data = shard_bytes(chunk, compute_items(job, chunk.items))
        gathered = distributed.gather(data, step[0].number)
        seconds = time.perf_counter() - began if any(missing) else 0.0
        for chunk, shard in zip(step, gathered, strict=False):
            if shard and distributed.is_rank_0():
                run.add(shard_name(chunk.number), shard)
        if distributed.is_rank_0():
            files += sum(run.add_files(chunk, job.files) for chunk in step)
        computed = residues_in(compress(step, missing))
        on_progress(Progress(residues_in(step), computed, job.items.total, seconds=seconds))
    on_progress(begin(WRITING, f"finishing {folder.name}"))
    changed = job.items.has_changed()
    if distributed.all_sum(int(changed)):
        distributed.on_rank_0(run.drop_checksums)
        raise UserError(
            f"{job.items.input['name']} has changed while it was read, so the results computed from it are not used. "
            f"Remove {folder}, then start again."
        )
    distributed.on_rank_0(lambda: run.finish({"items": items, "shards": shards, "files": files}, job))
    return run


def residues_in(step: Iterable[Chunk]) -> int:
    """Return the number of residues in chunks."""
    return sum(item.length for chunk in step for item in chunk.items)


class Run:
    """A folder of shards.

    Attributes:
        folder: the folder.
        manifest: what the shards are computed from, and their number once the run is finished.
        checksums: {name: SHA-256} of the files that were written.
        on_progress: called while the results are read.
        total: residues of all results; None if unknown.
        doing: what the results are read for.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.checksums: dict[str, str] = {}
        self.on_progress: OnProgress = no_progress
        self.total: int | None = None
        self.doing = "reading the results"

    @property
    def finished(self) -> bool:
        """Whether the manifest says that the run is complete."""
        return "shards" in self.manifest

    def open(self) -> None:
        """Create the folder, or resume the run in it.

        Raises:
            UserError: the folder contains something else, or a run with other settings or input.
        """
        if (self.folder / MANIFEST).exists():
            before = read_manifest(self.folder)
            refuse_another(self.folder, before, self.manifest)
            remove_all_temporary(self.folder)
            self.manifest = before
            self.checksums = read_checksums(self.folder / CHECKSUMS)
            if self.finished and not self._intact():
                for key in ("items", "shards", "files", "left_out"):
                    self.manifest.pop(key, None)
            if not self.finished:
                self._write_checksums()  # without a line that a kill cut off
            return
        refuse_occupied(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_all_temporary(self.folder)
        self._write_manifest()

    def has(self, chunk: Chunk) -> bool:
        """Return whether the shard of a chunk exists and is intact."""
        return self._is_intact(shard_name(chunk.number))

    def _is_intact(self, name: str) -> bool:
        path = self.folder / name
        if name not in self.checksums or not path.is_file():
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == self.checksums[name]

    def _intact(self) -> bool:
        """Return whether all files of a finished run exist and are intact."""
        if len(self.checksums) != self.manifest["shards"] + 1 + self.manifest.get("files", 0):
            return False
        names = {INDEX, *(path.name for path in self.shards())}
        return names <= self.checksums.keys() and all(self._is_intact(name) for name in self.checksums)

    def shards(self) -> list[Path]:
        """Return the paths of the shards of a finished run, in order."""
        return [self.folder / shard_name(number) for number in range(self.manifest["shards"])]

    def results(self, kind: str | None = None) -> Iterator[Result]:
        """Yield the results of a finished run, in order. Writers that read them show progress in this way.

        Args:
            kind: the only array to read; None for all.

        Raises:
            UserError: a shard is damaged or missing.
        """
        self.on_progress(begin(WRITING, self.doing, self.total))
        for path in self.shards():
            residues = 0
            for result in read_shard(path, kind):
                residues += result.length
                yield result
            self.on_progress(Progress(residues, 0, self.total))

    def items(self) -> Iterator[tuple[int, str, int]]:
        """Yield the number, id and length of each result of a finished run, without reading its arrays.

        Raises:
            UserError: a shard is damaged or missing.
        """
        for path in self.shards():
            yield from shard_items(path)

    def add(self, name: str, data: bytes) -> None:
        """Write a file into the folder and record its checksum.

        Raises:
            OSError: the file cannot be written.
        """
        replace_file(self.folder / name, data)
        self.checksums[name] = hashlib.sha256(data).hexdigest()
        path = self.folder / CHECKSUMS
        try:
            with open(path, "a", encoding="ascii") as file:
                file.write(f"{self.checksums[name]}  {name}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"{path} cannot be written ({error.strerror}). {RESUME_HINT}") from error

    def add_files(self, chunk: Chunk, files: Callable[[Item], Files]) -> int:
        """Make the missing or damaged files of a chunk's items from its shard; return the number of all its files."""
        wanted = {item.number: files(item) for item in chunk.items}
        names = [name for made in wanted.values() for name in made]
        if not all(self._is_intact(name) for name in names):
            for result in read_shard(self.folder / shard_name(chunk.number)):
                for name, make in wanted[result.number].items():
                    if not self._is_intact(name):
                        self.add(name, make(result))
        return len(names)

    def drop_checksums(self) -> None:
        """Drop all checksums, so that a resumed run recomputes everything."""
        self.checksums.clear()
        self._write_checksums()

    def _write_checksums(self) -> None:
        lines = [f"{checksum}  {name}\n" for name, checksum in sorted(self.checksums.items())]
        replace_file(self.folder / CHECKSUMS, "".join(lines).encode())

    def _write_manifest(self) -> None:
        replace_file(self.folder / MANIFEST, json.dumps(self.manifest, indent=1).encode())

    def finish(self, counts: dict[str, int], job: Job) -> None:
        """Write the index and the checksums, and mark the run as complete in the manifest.

        Args:
            counts: number of "items", "shards" and "files".
            job: the job that was computed.

        Raises:
            UserError: there were no items.
        """
        if not counts["items"]:
            raise UserError("\n".join(["There is nothing to compute.", *job.items.left_out]))
        self.manifest |= {name: count for name, count in counts.items() if count} | {"left_out": job.items.left_out}
        table = io.StringIO()
        rows = csv.writer(table)
        for number, (item, columns) in enumerate(self._index(job)):
            if number == 0:
                rows.writerow(["number", "id", "length", "shard", *columns])
            rows.writerow([*item, *columns.values()])
        self.add(INDEX, table.getvalue().encode())
        self._write_checksums()
        self._write_manifest()

    def _index(self, job: Job) -> Iterator[tuple[tuple[int, str, int, str], dict[str, Any]]]:
        """Yield the row of each result in the index, and the additional columns of the job."""
        for path in self.shards():
            if job.columns is None:
                yield from (((*item, path.name), {}) for item in shard_items(path))
                continue
            for result in read_shard(path):
                yield (result.number, result.id, result.length, path.name), job.columns(result)


def shard_name(number: int) -> str:
    """Return the file name of the shard of a chunk."""
    return f"shard-{number:08d}.safetensors"


def shard_bytes(chunk: Chunk, results: Sequence[Arrays]) -> bytes:
    """Return the bytes of the shard of a chunk.

    The metadata has one entry: a list with [number, id, length] of each item, and the name of its files if it has any.
    Several entries would be written in varying order.
    """
    items = [[item.number, item.id, item.length, *([item.name] if item.name else [])] for item in chunk.items]
    tensors = {
        f"{item.number:08d}/{name}": np.ascontiguousarray(array)
        for item, arrays in zip(chunk.items, results, strict=True)
        for name, array in arrays.items()
    }
    return save(tensors, {"items": json.dumps(items)})


def read_shard(path: Path, kind: str | None = None) -> Iterator[Result]:
    """Yield the results in a shard.

    Args:
        path: the shard.
        kind: the only array to read; None for all.

    Raises:
        UserError: the shard is damaged or missing.
    """
    with _open_shard(path) as file:
        names: dict[int, list[str]] = {}
        for key in file.keys():  # noqa: SIM118
            prefix, _, name = key.partition("/")
            if kind in (None, name):
                names.setdefault(int(prefix), []).append(key)
        for number, id, length, *name in json.loads(file.metadata()["items"]):
            arrays = {key.partition("/")[2]: file.get_tensor(key) for key in names.get(number, [])}
            yield Result(number, id, length, arrays, *name)


def shard_items(path: Path) -> list[tuple[int, str, int]]:
    """Return the number, id and length of each item of a shard, without reading its arrays."""
    with _open_shard(path) as file:
        return [(number, id, length) for number, id, length, *_ in json.loads(file.metadata()["items"])]


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path} is damaged or missing ({error}). Run the same command to compute it again.") from error
