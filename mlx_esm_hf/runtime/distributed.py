"""Several processes that share one run (`mlx.launch`). Every rank computes; rank 0 writes.

Every collective operation of the package is here, because each must report a lost rank in the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_esm_hf.errors import UserError, UserRuntimeError

CHECKSUM_BYTES = 32
LOST = "Another process of this run was lost. Finished work is saved; run the same command again to continue."

T = TypeVar("T")


_lost = False  # whether a rank was lost: MLX may wait forever in a second collective operation after that


@contextmanager
def reporting_lost_ranks() -> Iterator[None]:
    """Raise MLX's errors in collective operations as `UserRuntimeError`. Also a decorator.

    MLX is lazy, so the block has to evaluate what it communicates, and only that.
    """
    global _lost
    if _lost:
        raise UserRuntimeError(LOST)
    try:
        yield
    except RuntimeError as error:
        _lost = True
        raise UserRuntimeError(LOST) from error


def rank() -> int:
    """Return the rank of this process, from 0. A single process is rank 0."""
    return mx.distributed.init().rank()


def size() -> int:
    """Return the number of ranks."""
    return mx.distributed.init().size()


def is_rank_0() -> bool:
    """Return whether this process is rank 0, the one that writes."""
    return rank() == 0


def all_sum(value: int) -> int:
    """Return the sum of the ranks' values. Every rank has to call it."""
    if size() == 1:
        return value
    return all_sum_array(mx.array(value)).item()  # type: ignore[return-value]


def all_sum_array(x: mx.array) -> mx.array:
    """Return the elementwise sum of the ranks' arrays, all of one shape, evaluated. Every rank has to call it."""
    mx.eval(x)
    with reporting_lost_ranks():
        total = mx.distributed.all_sum(x, stream=mx.cpu)
        mx.eval(total)
    return total


def average_gradients(gradients: Any) -> Any:
    """Return the mean of the ranks' trees of gradients, evaluated. Every rank has to call it."""
    import mlx.nn as nn

    mx.eval(gradients)
    with reporting_lost_ranks():
        mean = nn.average_gradients(gradients)
        mx.eval(mean)
    return mean


@reporting_lost_ranks()
def all_min(value: int) -> int:
    """Return the smallest of the ranks' values. Every rank has to call it."""
    if size() == 1:
        return value
    return mx.distributed.all_min(mx.array(value), stream=mx.cpu).item()  # type: ignore[return-value]


@reporting_lost_ranks()
def gather(data: bytes, step: int) -> list[bytes]:
    """Return the bytes that each rank passed, in rank order, on every rank.

    Args:
        data: the bytes of this rank.
        step: a number that differs between calls of one run, so that data of an earlier call is recognised.

    Raises:
        UserRuntimeError: another rank has ended. MLX does not always report this and may return uninitialised memory in
            place of its data, which is why a checksum travels with the data.
    """
    if size() == 1:
        return [data]
    sent = checksum(data, step) + data
    sizes = np.array(mx.distributed.all_gather(mx.array([len(sent)]), stream=mx.cpu))
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: len(sent)] = np.frombuffer(sent, np.uint8)
    gathered = np.array(mx.distributed.all_gather(mx.array(padded)[None], stream=mx.cpu))
    received = [row[:length].tobytes() for row, length in zip(gathered, sizes, strict=True)]
    parts = [(message[:CHECKSUM_BYTES], message[CHECKSUM_BYTES:]) for message in received]
    if any(checksum(part, step) != expected for expected, part in parts):
        raise UserRuntimeError(LOST)
    return [part for _, part in parts]


def checksum(data: bytes, step: int) -> bytes:
    """Return the SHA-256 of a step and its data."""
    return hashlib.sha256(step.to_bytes(8, "little") + data).digest()


def on_rank_0(action: Callable[[], T]) -> T | None:
    """Run `action` on rank 0 while the other ranks wait. Return its result there, None elsewhere.

    Raises:
        Exception: on rank 0, what `action` raised.
        ValueError: on the other ranks, if `action` raised; otherwise they would wait forever.
    """
    result, error = None, None
    if is_rank_0():
        try:
            result = action()
        except Exception as raised:
            error = raised
    try:
        failed = all_sum(int(error is not None))
    except UserRuntimeError:
        if error is None:
            raise
        raise error from None  # the reason why the other ranks have ended as well
    if failed:
        raise error or UserError("Rank 0 failed; see its message.")
    return result
