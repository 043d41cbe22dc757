"""Standard output and error of the command line: errors if they are closed, on a full disk, or a broken pipe."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlx_esm_hf.errors import UserError

FAILED = 1


class Output(io.FileIO):
    """Standard output. The first error ends the command; later ones are ignored, as Python flushes again at exit."""

    failed = False

    def write(self, data: Any) -> int:
        """Write bytes.

        Raises:
            UserError: they cannot be written.
            SystemExit: the reader of the pipe has ended, as in `mlx-esm env | head -1`.
        """
        if self.failed:
            return len(data)
        try:
            return super().write(data)
        except BrokenPipeError:
            self.failed = True
            raise SystemExit(FAILED) from None
        except OSError as error:
            self.failed = True
            reason = "it is closed" if error.errno == errno.EBADF else error.strerror
            raise UserError(f"Standard output cannot be written ({reason}).") from error


class Messages(io.FileIO):
    """Standard error. A message that cannot be written is dropped: the results do not depend on it."""

    def write(self, data: Any) -> int:
        """Write bytes, or drop them."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Use `Output` and `Messages` as standard output and error, and flush them when the block ends.

    Closed streams get a descriptor first. Otherwise, the next opened file would get it, and messages of other libraries
    would be written into that file.
    """
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest free descriptor; writing to 1 is still an error
    sys.stdout = wrapped(Output(1, "w", closefd=False), sys.stdout)
    sys.stderr = wrapped(Messages(2, "w", closefd=False), sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()


def wrapped(raw: io.FileIO, before: Any) -> io.TextIOWrapper:
    """Return a text stream on a file, with the encoding of the stream that it replaces (None if that was closed)."""
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(before, "encoding", "utf-8"),
        errors=getattr(before, "errors", "replace"),
        line_buffering=True,
    )
