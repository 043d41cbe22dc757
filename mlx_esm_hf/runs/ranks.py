"""Processes or machines that share a run (`mlx.launch`). All compute; the first one writes. Alone, one is the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx
import numpy as np

T = TypeVar("T")


def rank() -> int:
    """The number of this process, from 0."""
    return mx.distributed.init().rank()


def size() -> int:
    """How many processes there are."""
    return mx.distributed.init().size()


def total(value: int) -> int:
    """The sum of what the ranks say; they all wait for it."""
    if size() == 1:
        return value
    return mx.distributed.all_sum(mx.array(value), stream=mx.cpu).item()  # type: ignore[return-value]


def smallest(value: int) -> int:
    """The smallest of what the ranks say; they all wait for it."""
    if size() == 1:
        return value
    return mx.distributed.all_min(mx.array(value), stream=mx.cpu).item()  # type: ignore[return-value]


def gather(data: bytes) -> list[bytes]:
    """The data of each rank, in their order, on all of them."""
    if size() == 1:
        return [data]
    sizes = np.array(mx.distributed.all_gather(mx.array([len(data)]), stream=mx.cpu))
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    gathered = np.array(mx.distributed.all_gather(mx.array(padded)[None], stream=mx.cpu))
    return [row[:length].tobytes() for row, length in zip(gathered, sizes, strict=True)]


def on_first(action: Callable[[], T]) -> T | None:
    """Let the first rank do something while the others wait; they get None.

    Raises:
        Exception: what the action raised, on the first rank; on the others a ValueError, since they would wait for it
            for good.
    """
    result, error = None, None
    if rank() == 0:
        try:
            result = action()
        except Exception as raised:
            error = raised
    if total(int(error is not None)):
        raise error or ValueError("The first rank does not go on, and says why.")
    return result
