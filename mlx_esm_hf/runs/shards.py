"""The files of a run's results: a safetensors file for each chunk, with tensors called "<number>/<name>"."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runs.job import Arrays, Chunk, Result


def shard_name(number: int) -> str:
    """The file of a chunk."""
    return f"shard-{number:08d}.safetensors"


def shard_bytes(chunk: Chunk, results: Sequence[Arrays]) -> bytes:
    """A shard; the metadata has one entry, [number, id, length] of each item and the name of its files if it has any,
    since the order of entries can vary."""
    items = [[item.number, item.id, item.length, *([item.name] if item.name else [])] for item in chunk.items]
    tensors = {
        f"{item.number:08d}/{name}": np.ascontiguousarray(array)
        for item, arrays in zip(chunk.items, results, strict=True)
        for name, array in arrays.items()
    }
    return save(tensors, {"items": json.dumps(items)})


def read_shard(path: Path) -> Iterator[Result]:
    """The results in a shard.

    Raises:
        ValueError: it is damaged or missing.
    """
    with _opened(path) as file:
        names: dict[int, list[str]] = {}
        for key in file.keys():  # noqa: SIM118
            names.setdefault(int(key.partition("/")[0]), []).append(key)
        for number, id, length, *name in json.loads(file.metadata()["items"]):
            arrays = {key.partition("/")[2]: file.get_tensor(key) for key in names.get(number, [])}
            yield Result(number, id, length, arrays, *name)


def shard_items(path: Path) -> list[tuple[int, str, int]]:
    """Number, id and residues of each item of a shard, without its arrays."""
    with _opened(path) as file:
        return [(number, id, length) for number, id, length, *_ in json.loads(file.metadata()["items"])]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path} is damaged or missing ({error}); the same command computes it again.") from error
