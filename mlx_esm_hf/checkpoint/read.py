"""Weights from files: safetensors or `.bin`, whole or in shards."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from mlx_esm_hf.checkpoint.descriptors import zero_taken
from mlx_esm_hf.checkpoint.mapped import mapped
from mlx_esm_hf.checkpoint.torch_bin import load_torch_bin
from mlx_esm_hf.errors import CheckpointError


def load_file(path: str | os.PathLike[str]) -> dict[str, mx.array]:
    """{key: array} of one weights file. The arrays of a safetensors file are read when they are evaluated; large ones,
    of a `.bin`, too, are mapped where they can be (see `mapped`).

    Raises:
        CheckpointError: the file is cut off, corrupt or of another format.
    """
    if Path(path).suffix != ".safetensors":
        return load_torch_bin(path)
    try:
        with safe_open(path, framework="numpy"):  # checks the header against the length of the file
            pass
    except SafetensorError as error:
        hint = "Download it again."
        with open(path, "rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                hint = "It is a Git LFS pointer, not the weights: fetch them with `git lfs pull`."
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}). {hint}") from error
    try:
        with zero_taken():
            arrays: dict[str, mx.array] = mx.load(str(path), format="safetensors")  # type: ignore[assignment]
    except RuntimeError as error:
        raise CheckpointError(f"{path}: MLX cannot read it ({error}). Convert it to float32 or float16.") from error
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    for key, array in arrays.items():
        in_file = mapped(path, start + header[key]["data_offsets"][0], array.shape, array.dtype)
        if in_file is not None:
            arrays[key] = in_file
    return arrays


def load_files(paths: list[str]) -> dict[str, mx.array]:
    """{key: array} of a checkpoint's files together.

    Raises:
        CheckpointError: as `load_file`, or a key stands in two files.
    """
    arrays: dict[str, mx.array] = {}
    for path in paths:
        loaded = load_file(path)
        if twice := arrays.keys() & loaded.keys():
            raise CheckpointError(f"{path} holds {min(twice)!r} again, which stands in a shard before it.")
        arrays |= loaded
    return arrays
