"""The output folder of `mlx-esm train` and `mlx-esm finetune`, locked by one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runs.lock import locked
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.files import finish_replacing
from mlx_esm_hf.training.checkpoints import NAME, checkpoints_in
from mlx_esm_hf.training.evaluator import LOG

DATA = "data"


@contextmanager
def training_folder(output: str | os.PathLike[str]) -> Iterator[bool]:
    """Lock a folder for one training while the block runs. Yields whether it contains a checkpoint to resume from.

    Raises:
        ValueError: the folder contains something else or a finished training, or another process is training in it.
    """
    folder = Path(output)
    with locked(folder):
        distributed.on_rank_0(lambda: finish_replacing(folder))
        names = [name for name in os.listdir(folder) if not name.startswith(".")] if folder.is_dir() else []
        if not {"config.json", "adapter_config.json"}.isdisjoint(names):
            raise UserError(f"{folder} already contains a model: choose another output, or remove the folder.")
        others = [name for name in names if name not in (DATA, LOG) and not NAME.fullmatch(name)]
        if others or (folder.exists() and not folder.is_dir()):
            raise UserError(f"{folder} already exists and is not a training: choose another output, or remove it.")
        resumes = bool(folder.is_dir() and checkpoints_in(folder))
        if not resumes:  # the log of a run that was stopped before its first checkpoint
            distributed.on_rank_0(lambda: (folder / LOG).unlink(missing_ok=True))
        yield resumes
