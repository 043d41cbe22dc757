"""Atomic files and folders: each appears complete under its name, or not at all."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Write = Callable[[Path], None]

RESUME_HINT = "All finished work is kept; run the same command again to resume."


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Create an empty file next to `path`, to be written and then renamed to it. It is removed when the block ends.

    Its name is new, so no other process writes to it and no link waits under it.
    """
    temporary = temporary_name(path)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Create an empty folder next to `path`. What it holds when the block ends is removed."""
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_name(path: Path) -> Path:
    """Return a hidden name next to `path` that nothing has yet."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part{path.suffix}")


def remove_temporary(path: Path) -> None:
    """Remove what a killed process left of `temporary_file` or `temporary_folder` for `path`."""
    remove_all_temporary(path.parent, glob.escape(path.name))


def remove_all_temporary(folder: Path, pattern: str = "*") -> None:
    """Remove what killed processes left in `folder` of temporary files and folders for names that match `pattern`."""
    for name in glob.glob(f".{pattern}.????????.part*", root_dir=folder):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until the content of a file would survive a power failure."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, replacing an earlier one atomically.

    Raises:
        OSError: the file cannot be written. The message says how to resume.
    """
    try:
        with temporary_file(path) as temporary:
            temporary.write_bytes(data)
            flush_to_disk(temporary)
            os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}). {RESUME_HINT}") from error


def place_file(temporary: Path, path: Path) -> None:
    """Give a finished file its name, without ever replacing another file.

    Raises:
        FileExistsError: a file of this name already exists.
    """
    try:
        os.link(temporary, path)  # unlike renaming, this never replaces a file
    except FileExistsError:
        raise
    except OSError:  # the file system has no hard links
        if os.path.lexists(path):
            raise FileExistsError(str(path)) from None
        os.replace(temporary, path)


@contextmanager
def replace_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder whose files move into `folder` when the block ends, or are removed if it raises."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder / "saving") as temporary:
        yield temporary
        for file in sorted(temporary.iterdir()):
            os.replace(file, folder / file.name)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, or is removed if it raises.

    Raises:
        FileExistsError: `path` already exists and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} already exists. Nothing was written.")
    with replace_folder(path) as folder:
        yield folder


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block ends, or is removed if it raises.

    It has the name of `path` already, inside a hidden folder next to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path) as temporary:
        folder = temporary / path.name
        folder.mkdir()
        yield folder
        for file in folder.rglob("*"):
            if file.is_file():
                flush_to_disk(file)
        remove_folder(path)
        os.replace(folder, path)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it exists. It is renamed first, so that a half-removed one never has the name `path`."""
    removed = removed_name(path)
    shutil.rmtree(removed, ignore_errors=True)  # of an earlier process that was killed
    if path.exists():
        os.replace(path, removed)
        shutil.rmtree(removed, ignore_errors=True)


def removed_name(path: Path) -> Path:
    """Return the name that a folder has while it is removed."""
    return path.with_name(f".{path.name}.gone")
