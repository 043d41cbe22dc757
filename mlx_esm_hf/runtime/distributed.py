"""Processes or machines that share a run (`mlx.launch`). All compute; the first one writes. Alone, one is the first."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx
import numpy as np

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runtime.files import GO_ON

SIGNATURE = 32  # bytes

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


def gather(data: bytes, step: int) -> list[bytes]:
    """The data of each rank, in their order, on all of them.

    Args:
        step: tells this from every other gathering.

    Raises:
        OSError: another rank has ended. What MLX then gives for its data is what lay in memory.
    """
    if size() == 1:
        return [data]
    signed = signature(data, step) + data
    sizes = np.array(mx.distributed.all_gather(mx.array([len(signed)]), stream=mx.cpu))
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: len(signed)] = np.frombuffer(signed, np.uint8)
    gathered = np.array(mx.distributed.all_gather(mx.array(padded)[None], stream=mx.cpu))
    received = [row[:length].tobytes() for row, length in zip(gathered, sizes, strict=True)]
    parts = [(one[:SIGNATURE], one[SIGNATURE:]) for one in received]
    if any(signature(rest, step) != start for start, rest in parts):
        raise OSError(f"Another rank has ended. {GO_ON}")
    return [rest for _, rest in parts]


def signature(data: bytes, step: int) -> bytes:
    return hashlib.sha256(step.to_bytes(8, "little") + data).digest()


def on_rank_0(action: Callable[[], T]) -> T | None:
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
        raise error or UserError("The first rank does not go on, and says why.")
    return result
