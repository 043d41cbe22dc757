"""Detection of forked processes, in which MLX would wait forever for threads that a fork does not copy."""

from __future__ import annotations

import os

from mlx_esm_hf.errors import UserRuntimeError

_owner: int | None = None  # the process that made the first model


def check_process() -> None:
    """Check that this process can compute. Called whenever a model is made or used.

    Raises:
        RuntimeError: this process was forked from one that had already made a model.
    """
    global _owner
    if _owner is None:
        _owner = os.getpid()
    if _owner != os.getpid():
        raise UserRuntimeError(
            f"This process was forked from {_owner} after a model had been made there. MLX cannot compute in "
            "it, because a fork does not copy MLX's threads. Start processes with "
            'multiprocessing.get_context("spawn") or "forkserver", and load the model in each of them.'
        )
