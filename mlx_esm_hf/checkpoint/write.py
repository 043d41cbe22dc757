"""Writing weights to safetensors files."""

from __future__ import annotations

import glob
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub import split_state_dict_into_shards_factory

from mlx_esm_hf.checkpoint.resolve import SAFETENSORS, with_variant
from mlx_esm_hf.errors import UserError

SAFETENSORS_DTYPES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.float32: "F32",
    mx.uint64: "U64",
    mx.int64: "I64",
}
UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def write_safetensors(path: Path, arrays: dict[str, mx.array]) -> None:
    """Write one file, with the metadata "pt" that transformers 4.x requires.

    Args:
        path: the file.
        arrays: {key: array}. Emptied: each array is evaluated, written and dropped in turn, so only one lazy array that
            the caller does not hold is in memory at a time.

    Raises:
        OSError: the file cannot be written.
        ValueError: an array has a dtype that MLX does not read from safetensors.
    """
    # Arrays of 8n bytes first, then by decreasing item size: this keeps every array aligned.
    names = sorted(arrays, key=lambda name: 9 - arrays[name].itemsize if arrays[name].nbytes % 8 else 0)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + arrays[name].nbytes
        dtype = arrays[name].dtype
        if dtype not in SAFETENSORS_DTYPES:
            raise UserError(f"{name!r} has dtype {dtype}, which MLX does not read from safetensors. Cast it first.")
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": arrays[name].shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                array: Any = mx.contiguous(arrays.pop(name))
                file.write(array.view(UNSIGNED[array.itemsize]))  # Python's buffers have no bfloat16
    except (OSError, RuntimeError) as error:
        raise OSError(f"{path.name} cannot be written to {path.parent} ({error}). Is the disk full?") from error


def save_safetensors(
    state: dict[str, mx.array], folder: Path, max_shard_size: int | str, variant: str | None = None
) -> list[str]:
    """Write `model.safetensors`, or shards and their index, and return the names of the files.

    Args:
        state: {key: array}. Emptied, see `write_safetensors`.
        folder: where to write.
        max_shard_size: maximum bytes of a file, or a string such as "5GB".
        variant: write `model.<variant>.safetensors`.
    """
    check_shard_size(max_shard_size)
    name = with_variant(SAFETENSORS, variant)
    split = split_state_dict_into_shards_factory(
        state,
        get_storage_size=lambda x: x.nbytes,
        filename_pattern=name.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    )
    for file, keys in split.filename_to_tensors.items():
        write_safetensors(folder / file, {k: state.pop(k) for k in keys})
    files = list(split.filename_to_tensors)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        files.append(with_variant(f"{SAFETENSORS}.index.json", variant))
        (folder / files[-1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return files


def stale_weights(variant: str | None = None) -> list[str]:
    """Return shell patterns of weights that would be read instead of newly saved ones or together with them."""
    stem = glob.escape(with_variant(SAFETENSORS, variant).removesuffix(".safetensors"))
    number = "[0-9]" * 5
    index = glob.escape(with_variant(f"{SAFETENSORS}.index.json", variant))
    return [f"{stem}.safetensors", f"{stem}-{number}-of-{number}.safetensors", index]


def check_shard_size(max_shard_size: int | str) -> None:
    """Refuse a maximum size of a weights file that is not a positive number of bytes.

    Raises:
        ValueError: it is not such as 5000000000 or "5GB".
    """
    if isinstance(max_shard_size, str):
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) *[KMGT]B", max_shard_size, re.IGNORECASE)
        is_size = match is not None and float(match[1]) > 0
    else:
        is_size = type(max_shard_size) is int and max_shard_size > 0
    if not is_size:
        raise UserError(f'max_shard_size must be a positive size such as "5GB", got {max_shard_size!r}.')
