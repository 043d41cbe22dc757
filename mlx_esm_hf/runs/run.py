"""Runs: jobs whose results are written while they are computed, and that are taken up where they stopped.

Chunks follow from the input and the settings alone. Each becomes one shard, a file that is there as a whole or not at
all; a run that is started again computes the shards that are missing. The manifest says what the shards were computed
with, and a run with other settings is refused.

Several ranks take turns at the chunks; the first one is given the shards of all and writes them.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from itertools import compress, islice
from pathlib import Path
from typing import Any

from mlx_esm_hf.runs import ranks
from mlx_esm_hf.runs.files import replace_file
from mlx_esm_hf.runs.job import Chunk, Job, OnProgress, Progress, Result, chunks
from mlx_esm_hf.runs.shards import read_shard, shard_bytes, shard_items, shard_name

MANIFEST, INDEX = "manifest.json", "index.csv"


def compute_run(job: Job, folder: Path, on_progress: OnProgress) -> Run:
    """The finished run of a job: what is missing of it is computed.

    Args:
        folder: is made; or that of a run with the same settings and input, which goes on.
        on_progress: is called after each step.

    Raises:
        ValueError: the folder holds something else, or a run with other settings or another input; there are no items.
        OSError: the folder cannot be made or written.
    """
    run = Run(folder, {"version": 1, "command": job.command, "settings": job.settings, "input": job.input})
    ranks.on_first(run.open)
    if ranks.total(int(run.finished)):
        job.left_out[:] = run.manifest.get("left_out", [])
        return run
    turns, items, shards = chunks(job.items(), job.chunk_work), 0, 0
    while turn := list(islice(turns, ranks.size())):
        items, shards = items + sum(len(chunk.items) for chunk in turn), shards + len(turn)
        missing = [not ranks.total(int(ranks.rank() == 0 and run.has(chunk))) for chunk in turn]
        mine = ranks.rank() < len(turn) and missing[ranks.rank()]
        data = b""
        if mine:
            chunk = turn[ranks.rank()]
            data = shard_bytes(chunk, job.compute(chunk.items))
        for chunk, shard in zip(turn, ranks.gather(data), strict=False):
            if shard and ranks.rank() == 0:
                run.write(shard_name(chunk.number), shard)
        on_progress(Progress(residues(turn), residues(compress(turn, missing)), job.total))
    ranks.on_first(lambda: run.finish(items, shards, job.left_out))
    return run


def residues(turn: Iterable[Chunk]) -> int:
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

    @property
    def finished(self) -> bool:
        return "shards" in self.manifest

    def open(self) -> None:
        """Make the folder, or go on with the run that is in it.

        Raises:
            ValueError: it holds something else, or another run.
        """
        if (self.folder / MANIFEST).exists():
            before = read_manifest(self.folder)
            self._refuse_another(before)
            self.manifest = before
            return
        if self.folder.exists() and (
            not self.folder.is_dir() or any(".part" not in name for name in os.listdir(self.folder))
        ):
            raise ValueError(f"{self.folder} is there already, and is no run: choose another output, or remove it.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_manifest()

    def _refuse_another(self, before: dict[str, Any]) -> None:
        if "sha256" not in self.manifest["input"]:
            raise ValueError(
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
            raise ValueError(
                f"{self.folder} holds a run that is not this one ({'; '.join(differences)}): choose another "
                "output, or remove it."
            )

    def has(self, chunk: Chunk) -> bool:
        """Whether the shard of a chunk is there."""
        return (self.folder / shard_name(chunk.number)).exists()

    def shards(self) -> list[Path]:
        """The shards that are there, in order."""
        return sorted(self.folder.glob("shard-*.safetensors"))

    def results(self) -> Iterator[Result]:
        """The results in order, of the shards that are there.

        Raises:
            ValueError: a shard is damaged, or one of a finished run is missing.
        """
        shards = self.shards()
        if self.finished and len(shards) != self.manifest["shards"]:
            raise ValueError(
                f"{self.folder} has {len(shards)} of its {self.manifest['shards']} shards: remove it, and compute it "
                "again."
            )
        for path in shards:
            yield from read_shard(path)

    def write(self, name: str, data: bytes) -> None:
        """Write a file into the folder, which is then there as a whole, on the disk, or not at all."""
        replace_file(self.folder / name, data)

    def _write_manifest(self) -> None:
        self.write(MANIFEST, json.dumps(self.manifest, indent=1).encode())

    def finish(self, items: int, shards: int, left_out: list[str]) -> None:
        """Write the index, and into the manifest that all is there.

        Raises:
            ValueError: there were no items.
        """
        if not items:
            raise ValueError("\n".join(["There is nothing to compute.", *left_out]))
        table = io.StringIO()
        rows = csv.writer(table)
        rows.writerow(["number", "id", "length", "shard"])
        for path in self.shards():
            rows.writerows([number, id, length, path.name] for number, id, length in shard_items(path))
        self.write(INDEX, table.getvalue().encode())
        self.manifest |= {"items": items, "shards": shards, "left_out": left_out}
        self._write_manifest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is none.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["command"], manifest["settings"], manifest["input"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the manifest of a run: remove {folder}, or choose another output.") from error
    return manifest
