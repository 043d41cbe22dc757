"""MLX computes on threads of its own, which a forked process does not have: there it would wait for them for good."""

from __future__ import annotations

import os

from mlx_esm_hf.errors import UserRuntimeError

_owner: int | None = None  # the process in which the first model was made


def check_process() -> None:
    """Make this process the one that computes; called whenever a model is made or used.

    Raises:
        RuntimeError: a model was made in another process, from which this one was forked.
    """
    global _owner
    if _owner is None:
        _owner = os.getpid()
    if _owner != os.getpid():
        raise UserRuntimeError(
            f"This process was forked from {_owner} after a model had been made there, and MLX cannot compute in it: "
            "it would wait for threads that fork does not copy. Start processes by "
            'multiprocessing.get_context("spawn") or "forkserver", and load the model in each of them.'
        )
