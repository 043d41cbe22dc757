"""Locks, so that only one process at a time writes an output."""

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
from mlx_esm_hf.runtime.files import make_parent


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Lock an output for the duration of the block, and create its folder. The ranks of a run share one lock.

    The lock is held on an empty file beside the output. The system releases it when the process ends, however it ends.

    Raises:
        UserError: another process has locked the output.
        OSError: the folder cannot be written.
    """
    real = Path(os.path.realpath(output))  # one lock, whichever link leads to the output
    path = real.with_name(f".{real.name}.mlx-esm.lock")
    make_parent(real)
    descriptor = distributed.on_rank_0(lambda: acquire(path, output))
    try:
        yield
    finally:
        if descriptor is not None:
            release(path, descriptor)


def acquire(path: Path, output: Path) -> int:
    """Open and lock the lock file, and return its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"{output} is being written by another process. Wait until it has ended, or choose another output."
            ) from None
        except OSError as error:  # the file system has no locks
            warnings.warn(f"{path} cannot be locked ({error}). Do not start a second run on {output}.", stacklevel=4)
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # the previous owner removed this file before it unlocked it: try again with a new one


def release(path: Path, descriptor: int) -> None:
    """Remove the lock file and release the lock."""
    path.unlink(missing_ok=True)  # before unlocking, so that it cannot be the lock of another process
    os.close(descriptor)
