"""Runs: jobs whose results are written while they are computed, and that are taken up where they stopped.

Chunks follow from the input and the settings alone. Each becomes one shard, a file that is there as a whole or not at
all, with a checksum. A run that is started again, finished or not, computes the shards that are missing or damaged. The
manifest says what the shards were computed with, and a run with other settings is refused. A job may have files made of
the results in a shard, which stand beside it.

Several ranks take turns at the chunks; the first one is given the shards of all and writes them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import compress, islice
from pathlib import Path
from typing import Any

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runs.job import Chunk, Files, Item, Job, OnProgress, Progress, Result, chunks
from mlx_esm_hf.runs.shards import read_shard, shard_bytes, shard_items, shard_name
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.files import RESUME_HINT, remove_all_temporary, replace_file

MANIFEST, INDEX = "manifest.json", "index.csv"
CHECKSUMS = "checksums.txt"  # as sha256sum has them, which can check them: sha256sum -c checksums.txt


def compute_run(job: Job, folder: Path, on_progress: OnProgress) -> Run:
    """The finished run of a job: what is missing of it is computed.

    Args:
        folder: is made; or that of a run with the same settings and input, which goes on.
        on_progress: is called after each step.

    Raises:
        ValueError: the folder holds something else, or a run with other settings or another input; there are no items;
            the input has changed meanwhile.
        OSError: the folder cannot be made or written.
    """
    run = Run(folder, {"version": 1, "command": job.command, "settings": job.settings, "input": job.input})
    distributed.on_rank_0(run.open)
    if distributed.all_sum(int(run.finished)):
        job.left_out[:] = run.manifest.get("left_out", [])
        return run
    turns, items, shards, files = chunks(job.items(), job.chunk_work), 0, 0, 0
    while turn := list(islice(turns, distributed.size())):
        items, shards = items + sum(len(chunk.items) for chunk in turn), shards + len(turn)
        missing = [not distributed.all_sum(int(distributed.is_rank_0() and run.has(chunk))) for chunk in turn]
        mine = distributed.rank() < len(turn) and missing[distributed.rank()]
        data = b""
        if mine:
            chunk = turn[distributed.rank()]
            data = shard_bytes(chunk, job.compute(chunk.items))
        for chunk, shard in zip(turn, distributed.gather(data, turn[0].number), strict=False):
            if shard and distributed.is_rank_0():
                run.add(shard_name(chunk.number), shard)
        if distributed.is_rank_0():
            files += sum(run.add_files(chunk, job.files) for chunk in turn)
        on_progress(Progress(residues(turn), residues(compress(turn, missing)), job.total))
    if distributed.all_sum(int(not job.input_is_same())):
        distributed.on_rank_0(run.distrust)
        raise UserError(
            f"{job.input['name']} has changed while it was read, and nothing that was computed of it is trusted: "
            f"remove {folder}, then start again."
        )
    distributed.on_rank_0(lambda: run.finish({"items": items, "shards": shards, "files": files}, job))
    return run


def residues(turn: Iterable[Chunk]) -> int:
    """How many there are in chunks."""
    return sum(item.length for chunk in turn for item in chunk.items)


class Run:
    """A folder of shards.

    Args:
        folder: where they are.
        manifest: what they are computed from; once the run is finished also how many they are.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.manifest = json.loads(json.dumps(manifest))
        self.checksums: dict[str, str] = {}

    @property
    def finished(self) -> bool:
        """Whether the manifest says that all is there."""
        return "shards" in self.manifest

    def open(self) -> None:
        """Make the folder, or go on with the run that is in it.

        Raises:
            ValueError: it holds something else, or another run.
        """
        if (self.folder / MANIFEST).exists():
            before = read_manifest(self.folder)
            self._refuse_another(before)
            remove_all_temporary(self.folder)
            self.manifest = before
            self.checksums = read_checksums(self.folder / CHECKSUMS)
            if self.finished and not self._intact():
                for key in ("items", "shards", "files", "left_out"):
                    self.manifest.pop(key, None)
            if not self.finished:
                self._write_checksums()  # without what a kill cut off
            return
        if self.folder.exists() and (
            not self.folder.is_dir() or any(".part" not in name for name in os.listdir(self.folder))
        ):
            raise UserError(f"{self.folder} is there already, and is no run: choose another output, or remove it.")
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_all_temporary(self.folder)
        self._write_manifest()

    def _refuse_another(self, before: dict[str, Any]) -> None:
        if "sha256" not in self.manifest["input"]:
            raise UserError(
                f"{self.folder} holds a run already, and what comes from {self.manifest['input']['name']!r} "
                "(not a file) cannot be taken up again: choose another output, or remove it."
            )
        differences = []
        if before["command"] != self.manifest["command"]:
            differences.append(f"command: {before['command']!r} there, {self.manifest['command']!r} here")
        for part in ("settings", "input"):
            for key, value in self.manifest[part].items():
                if key != "name" and before[part].get(key) != value:
                    differences.append(f"{key}: {before[part].get(key)!r} there, {value!r} here")
        if differences:
            raise UserError(
                f"{self.folder} holds a run that is not this one ({'; '.join(differences)}): choose another "
                "output, or remove it."
            )

    def has(self, chunk: Chunk) -> bool:
        """Whether the shard of a chunk is there, as it was written."""
        return self._is_intact(shard_name(chunk.number))

    def _is_intact(self, name: str) -> bool:
        path = self.folder / name
        return name in self.checksums and path.is_file() and sha256_of(path) == self.checksums[name]

    def _intact(self) -> bool:
        """Whether all of a finished run is there."""
        if len(self.checksums) != self.manifest["shards"] + 1 + self.manifest.get("files", 0):
            return False
        names = {INDEX, *(path.name for path in self.shards())}
        return names <= self.checksums.keys() and all(self._is_intact(name) for name in self.checksums)

    def shards(self) -> list[Path]:
        """The shards of a finished run, in order."""
        return [self.folder / shard_name(number) for number in range(self.manifest["shards"])]

    def results(self) -> Iterator[Result]:
        """The results of a finished run, in order.

        Raises:
            ValueError: a shard is damaged or missing.
        """
        for path in self.shards():
            yield from read_shard(path)

    def add(self, name: str, data: bytes) -> None:
        """Write a file into the folder, and its checksum."""
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
        """Make those files of a chunk's items that are missing or damaged, of its shard; returns how many there are."""
        wanted = {item.number: files(item) for item in chunk.items}
        names = [name for made in wanted.values() for name in made]
        if not all(self._is_intact(name) for name in names):
            for result in read_shard(self.folder / shard_name(chunk.number)):
                for name, make in wanted[result.number].items():
                    if not self._is_intact(name):
                        self.add(name, make(result))
        return len(names)

    def distrust(self) -> None:
        """Forget what was computed: whoever goes on computes all of it anew."""
        self.checksums.clear()
        self._write_checksums()

    def _write_checksums(self) -> None:
        lines = [f"{checksum}  {name}\n" for name, checksum in sorted(self.checksums.items())]
        replace_file(self.folder / CHECKSUMS, "".join(lines).encode())

    def _write_manifest(self) -> None:
        replace_file(self.folder / MANIFEST, json.dumps(self.manifest, indent=1).encode())

    def finish(self, counts: dict[str, int], job: Job) -> None:
        """Write the index and the checksums, and into the manifest that all is there.

        Args:
            counts: of items, shards and files.

        Raises:
            ValueError: there were no items.
        """
        if not counts["items"]:
            raise UserError("\n".join(["There is nothing to compute.", *job.left_out]))
        self.manifest |= {name: count for name, count in counts.items() if count} | {"left_out": job.left_out}
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
        """Of each result where it is, and what the job says of it."""
        for path in self.shards():
            if job.columns is None:
                yield from (((*item, path.name), {}) for item in shard_items(path))
                continue
            for result in read_shard(path):
                yield (result.number, result.id, result.length, path.name), job.columns(result)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The hash of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_checksums(path: Path) -> dict[str, str]:
    """{name: checksum}, of the last line for each name; lines that are none, such as one that a kill cut off, do not
    count."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="ascii", errors="replace").split("\n")
    return {match[2]: match[1] for line in lines if (match := re.fullmatch(r"([0-9a-f]{64})  (\S+)", line))}


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is none.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} {NO_MANIFEST.format(folder)} ({error})") from error
    if not is_manifest(manifest):
        raise UserError(f"{path} {NO_MANIFEST.format(folder)}")
    return manifest


NO_MANIFEST = "is not the manifest of a run: remove {}, or choose another output."


def is_manifest(value: Any) -> bool:
    """Whether what was read has the parts of a manifest, of the right types."""
    if not isinstance(value, dict) or not isinstance(value.get("command"), str):
        return False
    settings, source = value.get("settings"), value.get("input")
    if not isinstance(settings, dict) or not isinstance(source, dict):
        return False
    if not all(is_count(settings.get(name, 1)) for name in ("batch_tokens", "memory")):
        return False
    if not {"items", "shards", "left_out"} & value.keys():
        return True
    left_out = value.get("left_out")
    is_list = isinstance(left_out, list) and all(isinstance(message, str) for message in left_out)
    counts = (value.get("items"), value.get("shards"), value.get("files", 1))
    return is_list and all(is_count(count) for count in counts)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
