"""Reading weights from files: safetensors or `.bin`, one file or shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from mlx_esm_hf.checkpoint.mapped import mapped
from mlx_esm_hf.checkpoint.torch_bin import load_torch_bin
from mlx_esm_hf.errors import CheckpointError


def load_file(path: str | os.PathLike[str]) -> dict[str, mx.array]:
    """Return {key: array} of one weights file.

    Arrays of a safetensors file are read when they are evaluated. Large arrays of either format are mapped if possible
    (see `mapped`).

    Raises:
        CheckpointError: the file is truncated, corrupt or of another format.
    """
    if Path(path).suffix != ".safetensors":
        return load_torch_bin(path)
    try:
        with safe_open(path, framework="numpy"):  # compares the header with the size of the file
            pass
    except SafetensorError as error:
        hint = "Download it again."
        with open(path, "rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                hint = "It is a Git LFS pointer, not the weights: fetch them with `git lfs pull`."
        raise CheckpointError(f"{path} is not a complete safetensors file ({error}). {hint}") from error
    try:
        with descriptor_0_in_use():
            arrays: dict[str, mx.array] = mx.load(str(path), format="safetensors")  # type: ignore[assignment]
    except RuntimeError as error:
        raise CheckpointError(f"{path} cannot be read by MLX ({error}). Convert it to float32 or float16.") from error
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    for key, array in arrays.items():
        in_file = mapped(path, start + header[key]["data_offsets"][0], array.shape, array.dtype)
        if in_file is not None:
            arrays[key] = in_file
    return arrays


def load_files(paths: list[str]) -> dict[str, mx.array]:
    """Return {key: array} of all files of a checkpoint.

    Raises:
        CheckpointError: see `load_file`; or two files contain the same key.
    """
    arrays: dict[str, mx.array] = {}
    for path in paths:
        loaded = load_file(path)
        if duplicates := arrays.keys() & loaded.keys():
            raise CheckpointError(f"{path} contains {min(duplicates)!r}, which an earlier shard already contains.")
        arrays |= loaded
    return arrays


@contextmanager
def descriptor_0_in_use() -> Iterator[None]:
    """Keep file descriptor 0 in use during the block, so that no file is opened with it.

    It is free if standard input is closed, and MLX treats it as a failure to open a file.
    """
    descriptor = os.open(os.devnull, os.O_RDONLY)
    try:
        yield
    finally:
        os.close(descriptor)
