"""Locating the files of a checkpoint: in a folder, in the cache shared with transformers, or on the Hub."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from mlx_esm_hf.checkpoint.hub_errors import hub_error
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.runtime.files import finish_replacing
from mlx_esm_hf.version import __version__

SAFETENSORS = "model.safetensors"
TORCH_BIN = "pytorch_model.bin"
DOWNLOADS = 8  # simultaneous downloads of a sharded checkpoint


def with_variant(name: str, variant: str | None) -> str:
    """Return a file name with its variant, such as `model.fp16.safetensors` for the variant "fp16"."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}" if variant else name


def checkpoint_files(
    repo_id_or_dir: str, variant: str | None = None, use_safetensors: bool | None = None, **hub: Any
) -> list[str]:
    """Return the paths of the weights files, preferring safetensors to `.bin` and one file to shards.

    Args:
        repo_id_or_dir: a repository on the Hub, or a folder.
        variant: read `model.<variant>.safetensors`.
        use_safetensors: True to read only safetensors, False to read only `.bin`.
        **hub: arguments of `find_file`, such as `revision` and `cache_dir`.

    Raises:
        OSError: no weights were found; or see `find_file`.
        CheckpointError: the index of a sharded checkpoint is malformed, or names a file outside its folder.
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
    hint = "" if os.path.isdir(repo_id_or_dir) else " Offline, only files in the cache are found."
    raise OSError(f"{repo_id_or_dir} contains no weights: none of {', '.join(names)} was found.{hint}")


def find_shards(repo_id_or_dir: str, index: str, **hub: Any) -> list[str]:
    """Return the local paths of the shards that an index lists, downloading several missing ones at a time.

    Args:
        repo_id_or_dir: a repository on the Hub, or a folder.
        index: local path of the index file.
        **hub: arguments of `find_file`.

    Raises:
        OSError: a shard was not found; or see `find_file`.
        CheckpointError: see `shard_names`.
    """
    names = shard_names(index)
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        paths = list(pool.map(lambda name: find_file(repo_id_or_dir, name, **hub), names))
    if missing := [name for name, path in zip(names, paths, strict=True) if path is None]:
        raise OSError(
            f"{repo_id_or_dir} does not appear to have a file named {' or '.join(missing)}, but its index "
            f"{os.path.basename(index)} lists it. The checkpoint is incomplete."
        )
    return [path for path in paths if path is not None]


def shard_names(path: str | os.PathLike[str]) -> list[str]:
    """Return the file names that an index of shards lists.

    Raises:
        CheckpointError: the index is damaged, or names a file outside its folder.
    """
    try:
        with open(path, encoding="utf-8") as file:
            shards = set(json.load(file)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not the index of a sharded checkpoint ({error!r}). Download it again."
        ) from error
    if not shards:
        raise CheckpointError(f"{path} lists no shards. Download it again.")
    for shard in shards:
        if not isinstance(shard, str) or os.path.basename(shard) != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{path} lists the shard {shard!r}, which is not in its folder. It was not read.")
    return sorted(shards)


def check_source(repo_id_or_dir: str) -> None:
    """Refuse a model that is neither a folder nor a possible name of a repository.

    Raises:
        OSError: the folder is not found, or it is a file.
    """
    if os.path.isdir(repo_id_or_dir):
        return
    if os.path.isfile(repo_id_or_dir):
        raise OSError(f"{repo_id_or_dir} is a file. Pass the folder of a checkpoint, or a Hub repository.")
    try:
        validate_repo_id(repo_id_or_dir)
    except HFValidationError as error:
        raise OSError(f"Folder {repo_id_or_dir} not found.") from error


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
    """Return the path of a file in a folder, or in the cache after downloading it; None if it does not exist.

    Args:
        repo_id_or_dir: a repository on the Hub, or a folder.
        name: name of the file.
        revision: a branch, tag or commit, or the result of `resolve_revision`. With the latter, files of
            that commit that the cache knows need no request.
        subfolder: folder of the file inside the repository.
        cache_dir: the cache; by default that of huggingface_hub.
        token: access token; by default the one of `hf auth login`.
        local_files_only: look only in the cache. A file that is not there counts as one that does not exist.
        force_download: download the file even if it is in the cache.

    Raises:
        OSError: the Hub refused or did not respond; the download was damaged and therefore removed; or an interrupted
            save into the folder cannot be finished.
    """
    path = os.path.join(subfolder, name)
    if os.path.isdir(repo_id_or_dir):
        path = os.path.join(repo_id_or_dir, path)
        finish_replacing(os.path.dirname(path))
        return path if os.path.isfile(path) else None
    check_source(repo_id_or_dir)
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
    """Compare a download with its checksum. huggingface_hub only compares the size.

    Args:
        path: the file in the cache, a link to a file that is named after its checksum.

    Raises:
        OSError: the file is damaged. It is removed from the cache.
    """
    blob = os.path.realpath(path)
    name = os.path.basename(blob)
    if not os.path.islink(path) or len(name) not in (40, 64):  # without links the cache does not store the checksum
        return
    if len(name) == 64:  # large files are named after their SHA-256
        sums = [hashlib.sha256()]
    else:  # others after git's SHA-1, which includes the size; on some mirrors after the plain SHA-1
        sums = [hashlib.sha1(b"blob %d\0" % os.path.getsize(blob)), hashlib.sha1()]
    with open(blob, "rb") as file:
        while piece := file.read(1 << 20):
            for checksum in sums:
                checksum.update(piece)
    if name in [checksum.hexdigest() for checksum in sums]:
        return
    for broken in (path, blob):
        if os.path.lexists(broken):  # another process may have removed it already
            os.unlink(broken)
    raise OSError(
        f"{os.path.basename(path)} was damaged in the download: its checksum is not {name}. It was removed from the "
        "cache. Try again."
    )
