"""Checkpoints of a training: whole or not there, and all that is needed to go on to the same numbers.

A checkpoint is an ordinary folder of a model, which `from_pretrained` reads here and in torch, or of adapters. It has
two files more: `training.safetensors`, the weights that are trained with the states of the optimiser and of the random
numbers, and `trainer_state.json`, how far the training got.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_esm_hf.checkpoint.read import load_files
from mlx_esm_hf.checkpoint.write import write_safetensors
from mlx_esm_hf.errors import CheckpointError, UserError
from mlx_esm_hf.runtime.files import remove_folder, replace_folder

ARRAYS, STATE = "training.safetensors", "trainer_state.json"
NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class TrainerState:
    """How far a training got; transformers' `TrainerState` has most of these names.

    Attributes:
        global_step: optimiser steps that were done.
        epoch: how much of the data was seen, in epochs.
        epochs_done, epoch_step: whole epochs, and steps of the one that runs.
        loss_since_log: the sum of the losses of the steps since the last line of the log.
        total_loss: that of all steps.
        tokens: real tokens that went through the model.
        log_history: the lines of the log.
        best_metric, best_model_checkpoint: of the best checkpoint, and its folder's name.
        settings: what the numbers depend on; a training with others does not go on from here.
    """

    global_step: int = 0
    epoch: float = 0.0
    epochs_done: int = 0
    epoch_step: int = 0
    loss_since_log: float = 0.0
    total_loss: float = 0.0
    tokens: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    best_model_checkpoint: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a training, the oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and (path / STATE).exists()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def write_checkpoint(folder: Path, state: TrainerState, arrays: Any, save_model: Callable[[Path], None]) -> Path:
    """Write `checkpoint-<step>` into the folder of a training.

    Args:
        arrays: a tree of what the training goes on with.
        save_model: writes model and tokenizer into a folder.
    """
    path = folder / f"checkpoint-{state.global_step}"
    with replace_folder(path) as part:
        save_model(part)
        write_safetensors(part / ARRAYS, dict(tree_flatten(arrays)))
        (part / STATE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    return path


def read_state(path: Path) -> TrainerState:
    """
    Raises:
        ValueError: the folder is no checkpoint of a training.
    """
    try:
        return TrainerState(**json.loads((path / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a checkpoint that a training can go on from ({error}).") from error


def read_arrays(path: Path) -> Any:
    """The tree of arrays of a checkpoint.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        arrays = load_files([str(path / ARRAYS)])
        mx.eval(arrays)
    except (OSError, CheckpointError, RuntimeError) as error:
        raise UserError(f"{path / ARRAYS} is damaged ({error}): go on from an earlier checkpoint.") from error
    return tree_unflatten(list(arrays.items()))


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints until there are as many as the limit says, but not the last nor the best one."""
    found = checkpoints_in(folder)
    kept = {found[-1].name, best}
    for path in [path for path in found if path.name not in kept]:
        if limit is None or len(found) <= limit:
            return
        remove_folder(path)
        found.remove(path)


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left."""
    for pattern in (".checkpoint-*.part", ".checkpoint-*.gone"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
