"""One process at a time for an output."""

from __future__ import annotations

import contextlib
import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runtime import distributed


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """While the block runs, no other process gets into such a block for this output. Ranks are one process.

    The lock is on an empty file beside the output. It ends with its process, however that ends.

    Raises:
        ValueError: another process has it.
        OSError: the folder cannot be written.
    """
    real = Path(os.path.realpath(output))  # a folder may have several names
    path = real.with_name(f".{real.name}.mlx-esm.lock")
    descriptor = distributed.on_rank_0(lambda: acquire(path, output))
    try:
        yield
    finally:
        if descriptor is not None:
            release(path, descriptor)


def acquire(path: Path, output: Path) -> int:
    """The descriptor of the lock file, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"{output} is being written by another process: wait until that has ended, or choose another output."
            ) from None
        except OSError as error:  # a file system without locks
            warnings.warn(f"{path} cannot be locked ({error}): start no second run for {output}.", stacklevel=4)
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # of a file that another process has just removed: that was its lock


def release(path: Path, descriptor: int) -> None:
    """Give the lock back."""
    path.unlink(missing_ok=True)  # while it is locked, so that it is nobody else's
    os.close(descriptor)
