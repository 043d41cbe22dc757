"""Long runs: proteins in, shards out, in order, with bounded memory, to be taken up where they stopped.

Items come in chunks that follow from the input and the settings alone. Each chunk becomes one shard, a safetensors
file that is there as a whole or not at all; a run that is started again computes the shards that are missing. The
manifest says what the shards were computed with, and a run with other settings is refused.

Several ranks (`mlx.launch`) take turns at the chunks; rank 0 is given the shards of all and writes them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress, islice
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mlx_esm_hf.data.proteins import STDIN, Report, Source, is_stdin

MANIFEST, INDEX = "manifest.json", "index.csv"
BATCHES = 16  # of a chunk: enough to order by length
CHUNK_BYTES = 1 << 28  # of results, which are in memory until they are written

Arrays = dict[str, np.ndarray]


class Item(NamedTuple):
    """What one record of the results is computed from."""

    number: int
    id: str
    content: Any
    length: int  # residues
    work: int  # tokens through the model
    size: int  # bytes of its results


class Chunk(NamedTuple):
    number: int
    items: list[Item]


class Record(NamedTuple):
    """What was computed of one item."""

    number: int
    id: str
    length: int
    arrays: Arrays


class Done(NamedTuple):
    """What progress is told after each chunk, in residues: its own, those of them just computed, those of all."""

    residues: int
    computed: int
    total: int | None


def chunks(items: Iterable[Item], batch_tokens: int) -> Iterator[Chunk]:
    """The items in order: as many as make `BATCHES` batches, or fill `CHUNK_BYTES`, at a time."""
    chunk: list[Item] = []
    number = work = size = 0
    for item in items:
        if chunk and (work + item.work > BATCHES * batch_tokens or size + item.size > CHUNK_BYTES):
            yield Chunk(number, chunk)
            number, chunk, work, size = number + 1, [], 0, 0
        chunk.append(item)
        work, size = work + item.work, size + item.size
    if chunk:
        yield Chunk(number, chunk)


def describe(source: Source) -> dict[str, str]:
    """The input of a run for its manifest: a file by its name and its hash, which is that of what was compressed."""
    if is_stdin(source):
        return {"name": STDIN}
    if not isinstance(source, (str, os.PathLike)):
        return {"name": "Python"}
    digest = hashlib.sha256()
    with open(source, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"name": os.path.basename(source), "sha256": digest.hexdigest()}


class Run:
    """A folder of shards, with what they were computed from. `complete`: it was found finished.

    Args:
        folder: is made; or that of a run with the same settings and input, which goes on.
        command, settings: what the results depend on.
        source: as `describe` says it. With a hash the run can be taken up again.

    Raises:
        ValueError: the folder holds something else, or a run with other settings or another input.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike[str], command: str, settings: dict[str, Any], source: dict[str, str]):
        self.folder = Path(folder)
        self.group = mx.distributed.init()
        self.manifest: dict[str, Any] = {"version": 1, "command": command, "settings": settings, "input": source}
        self.manifest = json.loads(json.dumps(self.manifest))
        refused = None
        if self.first_rank:
            try:
                self._open()
            except (OSError, ValueError) as error:
                refused = error
        if self._everywhere(int(refused is not None)):  # the others would wait for it for good
            raise refused or ValueError("The first rank does not go on with this output.")
        self.complete = bool(self._everywhere(int("records" in self.manifest)))

    def _open(self) -> None:
        path = self.folder / MANIFEST
        resumable = "sha256" in self.manifest["input"]
        if path.exists():
            before = read_manifest(self.folder)
            if not resumable:
                raise ValueError(
                    f"{self.folder} holds a run already, and what comes from {self.manifest['input']['name']!r} "
                    "(not a file) cannot be taken up again: choose another output, or remove it."
                )
            differences = [
                f"{key}: {before.get(part, {}).get(key)!r} there, {value!r} here"
                for part in ("settings", "input")
                for key, value in self.manifest[part].items()
                if key != "name" and before.get(part, {}).get(key) != value
            ]
            if before["command"] != self.manifest["command"]:
                differences.insert(0, f"command: {before['command']!r} there, {self.manifest['command']!r} here")
            if differences:
                raise ValueError(
                    f"{self.folder} holds a run that is not this one ({'; '.join(differences)}): choose another "
                    "output, or remove it."
                )
            self.manifest = before
            return
        if self.folder.exists() and (
            not self.folder.is_dir() or any(not name.endswith(".part") for name in os.listdir(self.folder))
        ):
            raise ValueError(f"{self.folder} is there already, and is no run: choose another output, or remove it.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(MANIFEST, json.dumps(self.manifest, indent=1).encode())

    @property
    def first_rank(self) -> bool:
        """Whether this is the rank that writes."""
        return bool(self.group.rank() == 0)

    def compute(
        self,
        items: Iterable[Item],
        batch_tokens: int,
        compute: Callable[[Sequence[Item]], Sequence[Arrays]],
        progress: Callable[[Done], None] = lambda done: None,
        total: int | None = None,
        report: Report | None = None,
    ) -> None:
        """Compute what is missing. The report, which fills while items are read, goes into the manifest at the end."""
        rank, size = self.group.rank(), self.group.size()
        turns, records, shards = chunks(items, batch_tokens), 0, 0
        while turn := list(islice(turns, size)):
            records, shards = records + sum(len(chunk.items) for chunk in turn), shards + len(turn)
            missing = [not self._there(chunk) for chunk in turn]
            mine = rank < len(turn) and missing[rank]
            shard = shard_bytes(turn[rank], compute(turn[rank].items)) if mine else b""
            for chunk, data in zip(turn, self._gather(shard), strict=False):
                if data and self.first_rank:
                    self._write(shard_name(chunk), data)
            progress(Done(residues(turn), residues(compress(turn, missing)), total))
        if self.first_rank:
            self._finish(records, shards, report)

    def records(self) -> Iterator[Record]:
        """The results in order, of the shards that are there.

        Raises:
            ValueError: a shard is damaged, or one of a finished run is missing.
        """
        there, all_of_them = len(list(self.folder.glob("shard-*.safetensors"))), self.manifest.get("shards")
        if all_of_them is not None and there != all_of_them:
            raise ValueError(f"{self.folder} has {there} of its {all_of_them} shards: remove it, and compute it again.")
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            yield from read_shard(path)

    def _finish(self, records: int, shards: int, report: Report | None) -> None:
        if not records:
            raise ValueError("\n".join(["There is nothing to compute.", *(report.left_out if report else [])]))
        index = self.folder / INDEX
        with open(index.with_suffix(".part"), "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["record", "id", "length", "shard"])
            for path in sorted(self.folder.glob("shard-*.safetensors")):
                rows.writerows([number, id, length, path.name] for number, id, length in shard_items(path))
        os.replace(index.with_suffix(".part"), index)
        self.manifest |= {"records": records, "shards": shards, "left_out": report.left_out if report else []}
        self._write(MANIFEST, json.dumps(self.manifest, indent=1).encode())

    def _write(self, name: str, data: bytes) -> None:
        part = self.folder / f"{name}.part"
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.folder / name)
        except OSError as error:
            raise OSError(
                f"{self.folder / name} cannot be written ({error.strerror}). What was done before is whole; the same "
                "command goes on from there."
            ) from error

    # Between ranks

    def _there(self, chunk: Chunk) -> bool:
        return bool(self._everywhere(int(self.first_rank and (self.folder / shard_name(chunk)).exists())))

    def _everywhere(self, value: int) -> int:
        """The sum of what the ranks say; they all wait for it."""
        return sum_of_ranks(self.group, value)

    def _gather(self, data: bytes) -> list[bytes]:
        if self.group.size() == 1:
            return [data]
        sizes = np.array(mx.distributed.all_gather(mx.array([len(data)]), group=self.group, stream=mx.cpu))
        padded = np.zeros(max(1, sizes.max()), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        gathered = np.array(mx.distributed.all_gather(mx.array(padded)[None], group=self.group, stream=mx.cpu))
        return [row[:size].tobytes() for row, size in zip(gathered, sizes, strict=True)]


def stream(
    items: Iterable[Item], batch_tokens: int, compute: Callable[[Sequence[Item]], Sequence[Arrays]]
) -> Iterator[Record]:
    """The results of items in order, computed chunk by chunk while they are read, and written nowhere."""
    for chunk in chunks(items, batch_tokens):
        for item, arrays in zip(chunk.items, compute(chunk.items), strict=True):
            yield Record(item.number, item.id, item.length, arrays)


def sum_of_ranks(group: mx.distributed.Group, value: int) -> int:
    if group.size() == 1:
        return value
    return mx.distributed.all_sum(mx.array(value), group=group, stream=mx.cpu).item()  # type: ignore


def wait_for_all() -> None:
    """Until all ranks are here: the launcher ends all of them when one ends with an error code."""
    sum_of_ranks(mx.distributed.init(), 0)


def residues(turn: Iterable[Chunk]) -> int:
    return sum(item.length for chunk in turn for item in chunk.items)


# Shards: tensors "<record>/<name>"; the metadata has one entry, whose order cannot vary.


def shard_name(chunk: Chunk) -> str:
    return f"shard-{chunk.number:08d}.safetensors"


def shard_bytes(chunk: Chunk, results: Sequence[Arrays]) -> bytes:
    items = [[item.number, item.id, item.length] for item in chunk.items]
    tensors = {
        f"{item.number:08d}/{name}": np.ascontiguousarray(array)
        for item, arrays in zip(chunk.items, results, strict=True)
        for name, array in arrays.items()
    }
    return save(tensors, {"records": json.dumps(items)})


def opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it; the same command computes it again.") from error


def shard_items(path: Path) -> list[tuple[int, str, int]]:
    """Number, id and residues of each record of a shard."""
    with opened(path) as file:
        return [tuple(item) for item in json.loads(file.metadata()["records"])]


def read_shard(path: Path) -> Iterator[Record]:
    with opened(path) as file:
        names: dict[int, list[str]] = {}
        for key in file.keys():  # noqa: SIM118
            names.setdefault(int(key.partition("/")[0]), []).append(key)
        for number, id, length in json.loads(file.metadata()["records"]):
            arrays = {key.partition("/")[2]: file.get_tensor(key) for key in names.get(number, [])}
            yield Record(number, id, length, arrays)


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["command"], manifest["settings"], manifest["input"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the manifest of a run: remove {folder}, or choose another output.") from error
    return manifest


def shards_of(output: str | os.PathLike[str]) -> Path:
    """Where the shards are while a file is in the making."""
    return Path(f"{os.fspath(output)}.shards")


def discard(folder: Path) -> None:
    """Remove shards of which something was made. Renamed first, so that no part of them looks like a run."""
    gone = folder.with_name(f"{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone)


def earlier_settings(output: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The settings of a run that has begun to write this output; empty if there is none."""
    for folder in () if output is None else (Path(output), shards_of(output)):
        if (folder / MANIFEST).exists():
            return read_manifest(folder)["settings"]
    return {}
