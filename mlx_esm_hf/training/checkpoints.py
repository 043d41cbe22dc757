"""Training checkpoints. Each appears complete or not at all, and a training resumes from it to identical results.

A checkpoint is an ordinary model folder, which `from_pretrained` reads here and in torch, or an adapter folder, with
two more files: `training.safetensors` contains the trainable weights, the optimizer and the random state;
`trainer_state.json` contains the progress.
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
from mlx_esm_hf.runtime.files import remove_all_temporary, remove_folder, replace_folder

ARRAYS, STATE = "training.safetensors", "trainer_state.json"
NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class TrainerState:
    """The progress of a training, with the names of transformers' `TrainerState` where it has them.

    Attributes:
        global_step: optimizer steps done.
        epoch: epochs done, as a fraction.
        epochs_done: complete epochs.
        epoch_step: steps done in the current epoch.
        loss_since_log: sum of the losses of the steps since the last log line.
        total_loss: sum of the losses of all steps.
        tokens: real tokens seen.
        log_history: the lines of the log.
        best_metric: metric of the best checkpoint.
        best_model_checkpoint: folder name of the best checkpoint.
        settings: everything that affects results; resuming with different settings is refused.
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
    """Return the checkpoints in a training folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and (path / STATE).exists()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def write_checkpoint(folder: Path, state: TrainerState, arrays: Any, save_model: Callable[[Path], None]) -> Path:
    """Write `checkpoint-<step>` into a training folder and return its path.

    Args:
        folder: the training folder.
        state: the progress.
        arrays: a tree of the arrays that resuming needs.
        save_model: writes model and tokenizer into a folder.
    """
    path = folder / f"checkpoint-{state.global_step}"
    with replace_folder(path) as part:
        save_model(part)
        write_safetensors(part / ARRAYS, dict(tree_flatten(arrays)))
        (part / STATE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    return path


def read_state(path: Path) -> TrainerState:
    """Return the progress stored in a checkpoint.

    Raises:
        ValueError: the folder is not a training checkpoint.
    """
    try:
        return TrainerState(**json.loads((path / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a training checkpoint to resume from ({error}).") from error


def read_arrays(path: Path) -> Any:
    """Return the tree of arrays stored in a checkpoint.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        arrays = load_files([str(path / ARRAYS)])
        mx.eval(arrays)
    except (OSError, CheckpointError, RuntimeError) as error:
        raise UserError(f"{path / ARRAYS} is damaged ({error}): resume from an earlier checkpoint.") from error
    return tree_unflatten(list(arrays.items()))


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints until `limit` are left. The last and the best one are always kept."""
    found = checkpoints_in(folder)
    kept = {found[-1].name, best}
    for path in [path for path in found if path.name not in kept]:
        if limit is None or len(found) <= limit:
            return
        remove_folder(path)
        found.remove(path)


def remove_parts(folder: Path) -> None:
    """Remove incomplete checkpoints left by killed processes."""
    remove_all_temporary(folder, "checkpoint-*")
    for path in folder.glob(".checkpoint-*.gone"):
        shutil.rmtree(path, ignore_errors=True)
