"""The output folder of `mlx-esm train` and `mlx-esm finetune`: made, claimed by one process, and gone on with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runs.lock import locked
from mlx_esm_hf.training.checkpoints import NAME, checkpoints_in
from mlx_esm_hf.training.trainer import LOG

DATA = "data"


@contextmanager
def training_folder(output: str | os.PathLike[str]) -> Iterator[bool]:
    """Keep a folder for this training while the block runs; gives whether it holds a checkpoint to go on from.

    Raises:
        ValueError: the folder holds something else, or a finished training; another process trains there.
    """
    folder = Path(output)
    with locked(folder):
        names = [name for name in os.listdir(folder) if not name.startswith(".")] if folder.is_dir() else []
        if "config.json" in names:
            raise UserError(f"{folder} holds a model already: choose another output, or remove it.")
        others = [name for name in names if name not in (DATA, LOG) and not NAME.fullmatch(name)]
        if others or (folder.exists() and not folder.is_dir()):
            raise UserError(f"{folder} is there already, and is no training: choose another output, or remove it.")
        yield bool(folder.is_dir() and checkpoints_in(folder))
