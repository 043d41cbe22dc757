"""Weights to files, so that there is either the whole checkpoint or what was there before."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
from huggingface_hub import split_state_dict_into_shards_factory

from mlx_esm_hf.checkpoint.descriptors import zero_taken
from mlx_esm_hf.checkpoint.resolve import SAFETENSORS, with_variant


@contextmanager
def replace_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the block ends well, and vanish when it fails."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        yield Path(temporary)
        for file in sorted(Path(temporary).iterdir()):
            os.replace(file, folder / file.name)


def write_safetensors(path: Path, arrays: Mapping[str, mx.array]) -> None:
    """Write one file. Its metadata says "pt", without which transformers 4.x refuses it.

    Raises:
        OSError: it cannot be written.
    """
    try:
        with zero_taken():
            mx.save_safetensors(str(path), dict(arrays), metadata={"format": "pt"})
    except RuntimeError as error:
        raise OSError(f"{path.name} cannot be written to {path.parent} ({error}). Is the disk full?") from error


def save_safetensors(
    state: Mapping[str, mx.array], folder: Path, max_shard_size: int | str, variant: str | None = None
) -> list[str]:
    """Write `model.safetensors`, or shards and their index, into `folder`; returns the names of the files."""
    name = with_variant(SAFETENSORS, variant)
    split = split_state_dict_into_shards_factory(
        dict(state),
        get_storage_size=lambda x: x.nbytes,
        filename_pattern=name.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    )
    for file, keys in split.filename_to_tensors.items():
        write_safetensors(folder / file, {k: state[k] for k in keys})
    files = list(split.filename_to_tensors)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        files.append(with_variant(f"{SAFETENSORS}.index.json", variant))
        (folder / files[-1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return files


def remove_stale_shards(folder: str | os.PathLike[str], files: list[str], variant: str | None = None) -> None:
    """Remove the weights of an earlier save that would be read instead of, or beside, `files`."""
    stem = re.escape(with_variant(SAFETENSORS, variant).removesuffix(".safetensors"))
    index = re.escape(with_variant(f"{SAFETENSORS}.index.json", variant))
    stale = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors|{index}")
    for file in Path(folder).iterdir():
        if stale.fullmatch(file.name) and file.name not in files:
            file.unlink()
