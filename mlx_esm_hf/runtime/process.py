"""Processes and threads in which a model may be used.

A forked process may not: MLX would wait forever for threads that a fork does not copy.
"""

from __future__ import annotations

import os
import threading

import mlx.core as mx

from mlx_esm_hf.errors import UserRuntimeError

_owner: int | None = None  # the process that made the first model


class _ClearStreams:
    """Clears MLX's state of a thread at the end of the thread, while Python still waits for it.

    MLX does so after Python has let the thread go. If the process is exiting by then, it aborts
    (docs/upstream/mlx-abort-at-exit.md).
    """

    def __del__(self) -> None:
        mx.clear_streams()


_thread = threading.local()


def check_process() -> None:
    """Check that this process can compute. Called whenever a model is made or used.

    Raises:
        RuntimeError: this process was forked from one that had already made a model.
    """
    global _owner
    if not hasattr(_thread, "end"):
        _thread.end = None if threading.current_thread() is threading.main_thread() else _ClearStreams()
    if _owner is None:
        _owner = os.getpid()
    if _owner != os.getpid():
        raise UserRuntimeError(
            f"This process was forked from {_owner} after a model had been made there. MLX cannot compute in "
            "it, because a fork does not copy MLX's threads. Start processes with "
            'multiprocessing.get_context("spawn") or "forkserver", and load the model in each of them.'
        )
