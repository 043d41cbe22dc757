"""Files that are there as a whole, on the disk, or not at all."""

from __future__ import annotations

import glob
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Write = Callable[[Path], None]


@contextmanager
def part_of(path: Path) -> Iterator[Path]:
    """An empty file beside a path, to be written and then moved there; it is gone when the block ends.

    Nobody else has its name, or can have put a link there.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part{path.suffix}")
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def remove_parts(path: Path) -> None:
    """Remove what killed processes left of `part_of` this path."""
    remove_all_parts(path.parent, glob.escape(path.name))


def remove_all_parts(folder: Path, pattern: str = "*") -> None:
    """Remove what killed processes left of `part_of` any path in a folder whose name fits a pattern."""
    for part in glob.glob(f".{pattern}.????????.part*", root_dir=folder):
        (folder / part).unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Wait until what was written to a file would survive a loss of power."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, or put it in the place of the one that is there.

    Raises:
        OSError: it cannot be written; the message says what to do.
    """
    try:
        with part_of(path) as part:
            part.write_bytes(data)
            to_disk(part)
            os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}). {GO_ON}") from error


def place(part: Path, path: Path) -> None:
    """Give a file that is done its name.

    Raises:
        FileExistsError: there is a file of this name, which is not replaced.
    """
    try:
        os.link(part, path)  # unlike renaming, this never replaces a file
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise FileExistsError(str(path)) from None
        os.replace(part, path)


GO_ON = "What was done before is whole; the same command goes on from there."
