"""The files that a command is asked for: checked before the work, made from shards when it is done."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runs.lock import locked
from mlx_esm_hf.runs.run import MANIFEST, read_manifest
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.files import Write, flush_to_disk, place_file, remove_temporary, replace_file, temporary_file

PICTURES = (".png", ".svg", ".pdf")
# What a file of this suffix is written with, and the extra that brings it.
LIBRARIES = {
    ".h5": ("h5py", "hdf5"),
    ".parquet": ("pyarrow", "parquet"),
    **dict.fromkeys(PICTURES, ("matplotlib", "plots")),
    ".cif": ("modelcif", "fold"),
}

WRITTEN = "written.json"  # beside the shards: which of the files are there, and how to know them


def check_outputs(
    output: str | os.PathLike[str] | None, suffixes: Iterable[str], *others: str | os.PathLike[str] | None
) -> None:
    """Refuse outputs that cannot be written, before a model is loaded for them.

    Args:
        output: a file, or a folder of shards; None, there is none.
        suffixes: of the formats that the command has for it; "" is a folder of shards.
        others: files to be written beside it.

    Raises:
        ValueError: no format has this suffix, a library is not installed, a folder is missing, a file is there, or
            another process writes it.
        OSError: the folder cannot be written.
    """
    paths = [Path(other) for other in others if other is not None]
    if output is not None:
        path = Path(output)
        if path.suffix not in suffixes:
            known = ", ".join(suffix or "none, a folder of shards" for suffix in suffixes)
            raise UserError(f"{output}: the formats of this command are told by the suffixes {known}.")
        check_writable(path)
        with locked(path):  # which also removes the lock of a process that was killed at its end
            remove_gone(shards_of(path))
        if path.suffix:
            paths.append(path)
    for path in paths:
        check_writable(path)
        if paths.count(path) > 1:
            raise UserError(f"{path} is to be written twice: choose another name for one of the files.")
    refuse_existing(paths, None if output is None else shards_of(output))


def refuse_existing(paths: Iterable[Path], shards: Path | None) -> None:
    """Nothing that is there is ever written over.

    Args:
        paths: of files that are to be made.
        shards: of which they are made; files that were made of them before are no others.

    Raises:
        ValueError: there is another file, or anything else, under one of the names; a link in the place of the shards.
    """
    if shards is not None and shards.is_symlink():
        raise UserError(f"{shards} is a link, and shards are only put into a folder of their own: remove it.")
    written = {} if shards is None else read_written(shards)
    for path in paths:
        if os.path.lexists(path) and not is_written(path, written):
            if shards is not None and shards.exists():
                raise UserError(f"{path} is there already, and {shards} is not done: move the file away, then go on.")
            raise UserError(f"{path} is there already: choose another output, or remove it.")


@contextmanager
def claimed(output: Path | None, others: Iterable[Path] = ()) -> Iterator[None]:
    """While these files are made, or this folder of shards, by this process and no other.

    Raises:
        ValueError: another process makes them, or has just made them.
    """
    if output is None:
        yield
        return
    paths = [*others, output] if output.suffix else []
    with locked(output):
        distributed.on_rank_0(lambda: refuse_existing(paths, shards_of(output)))
        yield


def check_picture(path: str | os.PathLike[str] | None) -> None:
    """
    Raises:
        ValueError: a picture of this suffix cannot be drawn.
    """
    if path is not None and os.path.splitext(path)[1] not in PICTURES:
        raise UserError(f"{os.fspath(path)}: pictures are told by the suffixes {', '.join(PICTURES)}.")


def check_writable(path: str | os.PathLike[str]) -> None:
    """
    Raises:
        ValueError: there is no such folder, or what writes such a file is not installed.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise UserError(f"{os.fspath(path)} cannot be written: there is no folder {folder}.")
    check_library(path)


def check_library(path: str | os.PathLike[str]) -> None:
    """
    Raises:
        ValueError: what writes such a file is not installed.
    """
    module, extra = LIBRARIES.get(os.path.splitext(path)[1], ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise UserError(f"{os.fspath(path)} needs {module}: pip install 'mlx-esm-hf[{extra}]'.")


def shards_of(output: str | os.PathLike[str]) -> Path:
    """Where the shards are while a file is in the making."""
    return Path(f"{os.fspath(output)}.shards")


def earlier_settings(output: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The settings of a run that has begun to write this output; empty if there is none."""
    if output is None:
        return {}
    for folder in (Path(output), shards_of(output)):
        if (folder / MANIFEST).exists():
            return read_manifest(folder)["settings"]
    return {}


def write_files(files: Mapping[Path, Write], shards: Path) -> None:
    """Let each function make its file, if it did not before the run was stopped, then remove the shards.

    Raises:
        ValueError: something else is there by now.
        OSError: a file cannot be written.
    """
    written = read_written(shards)

    def remember(path: Path, part: Path) -> None:
        written[os.path.abspath(path)] = identity(part)
        replace_file(shards / WRITTEN, json.dumps(written).encode())

    for path, write in files.items():
        if is_written(path, written):
            remove_temporary(path)  # its other name, if a kill came right after it got this one
        else:
            write_new(path, write, remember)
    discard(shards)


def write_new(path: Path, write: Write, remember: Callable[[Path, Path], None] | None = None) -> None:
    """Let a function make a file where there is none.

    Args:
        remember: is told the path and the file that will get this name, before it gets it.

    Raises:
        ValueError: something is there by now.
        OSError: the file cannot be written.
    """
    remove_temporary(path)
    try:
        with temporary_file(path) as part:
            write(part)
            flush_to_disk(part)
            if remember is not None:
                remember(path, part)
            place_file(part, path)
    except FileExistsError:
        raise UserError(f"{path} is there already, since the work began: move it away, then go on.") from None
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}). The same command goes on from there.") from error


def read_written(shards: Path) -> dict[str, list[int]]:
    """{path: identity} of the files that were made of these shards."""
    try:
        written = json.loads((shards / WRITTEN).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return written if isinstance(written, dict) else {}


def is_written(path: Path, written: Mapping[str, list[int]]) -> bool:
    """Whether the file that is there is the one that was written."""
    return path.exists() and identity(path) == written.get(os.path.abspath(path))


def identity(path: Path) -> list[int]:
    """What stays with a file when it is renamed, and is that of no other."""
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def discard(folder: Path) -> None:
    """Remove shards of which something was made. Renamed first, so that no part of them looks like a run."""
    remove_gone(folder)
    os.replace(folder, discarded_name(folder))
    remove_gone(folder)


def discarded_name(folder: Path) -> Path:
    """What shards are called while they are removed."""
    return folder.with_name(f"{folder.name}.gone")


def remove_gone(folder: Path) -> None:
    """Remove what is left of shards that are not needed any more, which may be in the middle of being removed."""
    shutil.rmtree(discarded_name(folder), ignore_errors=True)
