"""The files that a command is asked for: checked before the work, made from shards when it is done."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_esm_hf.runs.run import MANIFEST, read_manifest

PICTURES = (".png", ".svg", ".pdf")
# What a file of this suffix is written with, and the extra that brings it.
LIBRARIES = {
    ".h5": ("h5py", "hdf5"),
    ".parquet": ("pyarrow", "parquet"),
    **dict.fromkeys(PICTURES, ("matplotlib", "plots")),
}

Write = Callable[[Path], None]


def check_output(output: str | os.PathLike[str] | None, suffixes: Iterable[str]) -> None:
    """Refuse an output that cannot be written, before a model is loaded for it.

    Args:
        output: None, there is none.
        suffixes: of the formats that the command has; "" is a folder of shards.

    Raises:
        ValueError: no format has this suffix, its library is not installed, its folder is missing, or it is there.
    """
    if output is None:
        return
    path = Path(output)
    if path.suffix not in suffixes:
        known = ", ".join(suffix or "none, a folder of shards" for suffix in suffixes)
        raise ValueError(f"{output}: the formats of this command are told by the suffixes {known}.")
    check_writable(path)
    shards = shards_of(path)
    if path.suffix and path.exists():
        if not shards.exists():
            raise ValueError(f"{output} is there already: choose another output, or remove it.")
        if (shards / MANIFEST).exists() and "shards" not in read_manifest(shards):
            raise ValueError(f"{output} is there already, and {shards} is not done: move the file away, then go on.")


def check_picture(path: str | os.PathLike[str]) -> None:
    """
    Raises:
        ValueError: a picture of this suffix cannot be drawn.
    """
    if os.path.splitext(path)[1] not in PICTURES:
        raise ValueError(f"{os.fspath(path)}: pictures are told by the suffixes {', '.join(PICTURES)}.")
    check_writable(path)


def check_writable(path: str | os.PathLike[str]) -> None:
    """
    Raises:
        ValueError: there is no such folder, or what writes such a file is not installed.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"{os.fspath(path)} cannot be written: there is no folder {folder}.")
    module, extra = LIBRARIES.get(os.path.splitext(path)[1], ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise ValueError(f"{os.fspath(path)} needs {module}: pip install 'mlx-esm-hf[{extra}]'.")


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
    """Let each function make its file, then remove the shards that they were made from.

    Args:
        files: what makes each of them. The last one is written last; if it is there, the run was stopped between this
            and the removal of the shards.
    """
    if not list(files)[-1].exists():
        for path, write in files.items():
            write_whole(path, write)
    discard(shards)


def write_whole(path: Path, write: Write) -> None:
    """Let a function make a file, which is then there as a whole, on the disk, or not at all."""
    part = path.with_name(f"{path.name}.part{path.suffix}")
    try:
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}). The same command goes on from there.") from error


def discard(folder: Path) -> None:
    """Remove shards of which something was made. Renamed first, so that no part of them looks like a run."""
    gone = folder.with_name(f"{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone)
