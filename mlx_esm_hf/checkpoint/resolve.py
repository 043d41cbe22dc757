"""Which files hold a checkpoint, on disk, in the cache that is shared with torch users, or on the Hub."""

from __future__ import annotations

import json
import os
from typing import Any

from transformers.utils.hub import cached_file, cached_files

from mlx_esm_hf.checkpoint.errors import CheckpointError

SAFETENSORS = "model.safetensors"
TORCH_BIN = "pytorch_model.bin"


def with_variant(name: str, variant: str | None) -> str:
    """`model.fp16.safetensors` for the variant "fp16" of `model.safetensors`."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}" if variant else name


def checkpoint_files(
    repo_id_or_dir: str, variant: str | None = None, use_safetensors: bool | None = None, **hub: Any
) -> list[str]:
    """Paths of the weights files: safetensors before `.bin`, whole before sharded.

    Args:
        hub: the arguments of `transformers.utils.hub.cached_file`, such as `revision` and `cache_dir`.

    Raises:
        OSError: there is no such repository, no network and no cache, or no weights in it.
        CheckpointError: the index of a sharded checkpoint is not one, or names a file outside its folder.
    """
    names = [SAFETENSORS] if use_safetensors else [TORCH_BIN] if use_safetensors is False else [SAFETENSORS, TORCH_BIN]
    names = [with_variant(n, variant) for name in names for n in (name, f"{name}.index.json")]
    for name in names:
        path = cached_file(
            repo_id_or_dir,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=True,
            **hub,
        )
        if path is None:
            continue
        if not name.endswith(".json"):
            return [path]
        return cached_files(repo_id_or_dir, shard_names(path), **hub) or []
    hint = "" if os.path.isdir(repo_id_or_dir) else " Offline, only what is in the cache counts."
    raise OSError(f"{repo_id_or_dir} holds none of {', '.join(names)}: there are no weights to load.{hint}")


def shard_names(path: str) -> list[str]:
    """The files that an index of shards names; refused if it is damaged, or would read outside its folder."""
    try:
        with open(path, encoding="utf-8") as file:
            shards = set(json.load(file)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not the index of a sharded checkpoint ({error!r}). Download it again."
        ) from error
    if not shards:
        raise CheckpointError(f"{path} names no shards. Download it again.")
    for shard in shards:
        if not isinstance(shard, str) or os.path.basename(shard) != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{path} names the shard {shard!r}, which is not a file beside it. It was not read.")
    return sorted(shards)
