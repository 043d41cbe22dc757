"""What MLX takes amiss about open files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def zero_taken() -> Iterator[None]:
    """While the block runs, no file that is opened gets the descriptor 0.

    It is free where standard input is closed, and MLX, whose files are opened by number, takes it for a failure.
    """
    descriptor = os.open(os.devnull, os.O_RDONLY)
    try:
        yield
    finally:
        os.close(descriptor)
