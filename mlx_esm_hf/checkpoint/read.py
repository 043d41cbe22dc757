"""Weights from files: safetensors or `.bin`, whole or in shards."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from mlx_esm_hf.checkpoint.descriptors import zero_taken
from mlx_esm_hf.checkpoint.errors import CheckpointError
from mlx_esm_hf.checkpoint.torch_bin import load_torch_bin
from mlx_esm_hf.ops import kernels

# Bytes of an array from which on it is mapped: each takes two pages more than it fills, and a call of the system.
MAPPED_FROM = 1 << 18


def load_file(path: str | os.PathLike[str]) -> dict[str, mx.array]:
    """{key: array} of one weights file. The arrays of a safetensors file are read when they are evaluated; large ones,
    where there are kernels, when their numbers are used, and again if the system has taken the memory meanwhile. So the
    file has to stay as it is: who writes it anew puts another into its place, as all do here.

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
    return arrays | map_large(path, arrays)


def map_large(path: str | os.PathLike[str], arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Those arrays of a whole safetensors file that can be mapped, and are large enough for that to be of use."""
    if kernels.native is None or sys.byteorder != "little":
        return {}
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    mapped = {}
    for key, array in arrays.items():
        if array.nbytes >= MAPPED_FROM:
            # Not every file system maps files, nor does every writer align the numbers.
            with contextlib.suppress(RuntimeError, ValueError):
                offset = start + header[key]["data_offsets"][0]
                mapped[key] = kernels.native.mapped(str(path), offset, array.shape, array.dtype)
    return mapped


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
