"""Which files hold a checkpoint, on disk, in the cache that is shared with torch users, or on the Hub."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError

from mlx_esm_hf.checkpoint.hub_errors import hub_error
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.version import __version__

SAFETENSORS = "model.safetensors"
TORCH_BIN = "pytorch_model.bin"
DOWNLOADS = 8  # at once, of a sharded checkpoint


def with_variant(name: str, variant: str | None) -> str:
    """`model.fp16.safetensors` for the variant "fp16" of `model.safetensors`."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}" if variant else name


def checkpoint_files(
    repo_id_or_dir: str, variant: str | None = None, use_safetensors: bool | None = None, **hub: Any
) -> list[str]:
    """Paths of the weights files: safetensors before `.bin`, whole before sharded.

    Args:
        hub: the arguments of `find_file`, such as `revision` and `cache_dir`.

    Raises:
        OSError: there are no weights, or what `find_file` raises.
        CheckpointError: the index of a sharded checkpoint is not one, or names a file outside its folder.
    """
    names = [SAFETENSORS] if use_safetensors else [TORCH_BIN] if use_safetensors is False else [SAFETENSORS, TORCH_BIN]
    names = [with_variant(n, variant) for name in names for n in (name, f"{name}.index.json")]
    for name in names:
        path = find_file(repo_id_or_dir, name, **hub)
        if path is None:
            continue
        if not name.endswith(".json"):
            return [path]
        return find_shards(repo_id_or_dir, path, **hub)
    hint = "" if os.path.isdir(repo_id_or_dir) else " Offline, only what is in the cache counts."
    raise OSError(f"{repo_id_or_dir} holds none of {', '.join(names)}: there are no weights to load.{hint}")


def find_shards(repo_id_or_dir: str, index: str, **hub: Any) -> list[str]:
    """The paths of the files that an index names, several being downloaded at once.

    Raises:
        OSError: one of them is not there, or what `find_file` raises.
        CheckpointError: as `shard_names`.
    """
    names = shard_names(index)
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        paths = list(pool.map(lambda name: find_file(repo_id_or_dir, name, **hub), names))
    if missing := [name for name, path in zip(names, paths, strict=True) if path is None]:
        raise OSError(
            f"{repo_id_or_dir} does not appear to have a file named {' or '.join(missing)}, but its index "
            f"{os.path.basename(index)} says that weights are in it. It is not a whole checkpoint."
        )
    return [path for path in paths if path is not None]


def shard_names(path: str | os.PathLike[str]) -> list[str]:
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


def find_file(
    repo_id_or_dir: str,
    name: str,
    *,
    revision: str = "main",
    subfolder: str = "",
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> str | None:
    """The path of a file in a folder, in the cache, or downloaded into it; None if there is no such file.

    Args:
        revision: a branch, a tag, a commit, or what `resolve_revision` made of it: then the cache alone is asked for
            what is known of that commit.
        local_files_only: look into the cache only, where a file that is not there counts as one that does not exist.

    Raises:
        OSError: the Hub did not answer, or refused; or the file arrived damaged. Nothing of it is kept.
    """
    path = os.path.join(subfolder, name)
    if os.path.isdir(repo_id_or_dir):
        path = os.path.join(repo_id_or_dir, path)
        return path if os.path.isfile(path) else None
    cache_dir = None if cache_dir is None else os.fspath(cache_dir)
    commit = getattr(revision, "resolved", None)
    if commit and not force_download:
        known = try_to_load_from_cache(repo_id_or_dir, path, cache_dir=cache_dir, revision=commit)
        if known is _CACHED_NO_EXIST:
            return None
        if isinstance(known, str):
            return known
    try:
        downloaded = hf_hub_download(
            repo_id_or_dir,
            name,
            subfolder=subfolder or None,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            library_name="mlx-esm-hf",
            library_version=__version__,
        )
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError as error:
        if local_files_only or is_offline_mode():
            return None
        raise hub_error(error, f"{path} of {repo_id_or_dir}", repo_id_or_dir, revision) from error
    except (HTTPError, ValueError) as error:
        raise hub_error(error, f"{path} of {repo_id_or_dir}", repo_id_or_dir, revision) from error
    check_download(downloaded)
    return downloaded


def check_download(path: str) -> None:
    """Compare what has just arrived with the checksum that the Hub calls it by; huggingface_hub counts its bytes.

    Raises:
        OSError: it is damaged. It is removed from the cache.
    """
    blob = os.path.realpath(path)
    name = os.path.basename(blob)
    if not os.path.islink(path) or len(name) not in (40, 64):  # without links the cache does not keep the checksum
        return
    if len(name) == 64:  # large files are called by their sha256
        sums = [hashlib.sha256()]
    else:  # others by git's sha1, with a length before the content; by a plain one on some mirrors
        sums = [hashlib.sha1(b"blob %d\0" % os.path.getsize(blob)), hashlib.sha1()]
    with open(blob, "rb") as file:
        while piece := file.read(1 << 20):
            for checksum in sums:
                checksum.update(piece)
    if name in [checksum.hexdigest() for checksum in sums]:
        return
    for broken in (path, blob):
        if os.path.lexists(broken):  # another process may have found it, too
            os.unlink(broken)
    raise OSError(
        f"{os.path.basename(path)} arrived damaged: its checksum is not {name}. It was removed from the cache; load it "
        "again."
    )
