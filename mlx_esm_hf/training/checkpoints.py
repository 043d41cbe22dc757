"""Training checkpoints. Each appears complete or not at all, and a training resumes from it to identical results.

A checkpoint is an ordinary model folder, which `from_pretrained` reads here and in torch, or an adapter folder, with
three more files: `training.safetensors` contains the trainable weights, the optimizer and the random state;
`trainer_state.json` the progress; `checksums.txt` the checksums of the others.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_esm_hf.checkpoint.read import load_files
from mlx_esm_hf.checkpoint.write import write_safetensors
from mlx_esm_hf.errors import CheckpointError, UserError
from mlx_esm_hf.runs.manifest import CHECKSUMS
from mlx_esm_hf.runtime.files import finish_replacing, remove_all_temporary, remove_folder, replace_folder
from mlx_esm_hf.training.checksums import check_files, write_checksums

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
        best_metric: best metric of all evaluations.
        best_checkpoint_metric: metric of the best checkpoint. It differs if the best evaluation wrote none.
        best_model_checkpoint: path of the best checkpoint. A checkpoint stores its name.
        callbacks: what callbacks want to keep.
        settings: everything that determines the result; resuming with different settings is refused.
        frozen: checksum of the parameters that are not trained; None if it was not computed.
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
    best_checkpoint_metric: float | None = None
    best_model_checkpoint: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    frozen: str | None = None
    callbacks: dict[str, Any] = field(default_factory=dict)

    # Not stored; with the names and values that transformers' callbacks expect.
    max_steps: ClassVar[int] = 0
    num_train_epochs: ClassVar[float] = 0
    logging_steps: ClassVar[float] = 0
    eval_steps: ClassVar[float] = 0
    save_steps: ClassVar[float] = 0
    train_batch_size: ClassVar[int] = 0
    total_flos: ClassVar[float] = 0
    is_local_process_zero: ClassVar[bool] = True
    is_world_process_zero: ClassVar[bool] = True
    is_hyper_param_search: ClassVar[bool] = False
    trial_name: ClassVar[str | None] = None
    trial_params: ClassVar[dict[str, Any] | None] = None

    @property
    def best_name(self) -> str | None:
        """Folder name of the best checkpoint."""
        return None if self.best_model_checkpoint is None else Path(self.best_model_checkpoint).name

    @property
    def best_global_step(self) -> int | None:
        """Step of the best checkpoint."""
        return None if self.best_name is None else int(self.best_name.rpartition("-")[2])

    @property
    def num_input_tokens_seen(self) -> int:
        """Real tokens seen."""
        return self.tokens

    def to_json(self) -> str:
        """Return the text that a checkpoint stores."""
        return json.dumps(asdict(self) | {"best_model_checkpoint": self.best_name}, indent=1)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a training folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name)]
    for path in found:
        finish_replacing(path)
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def write_checkpoint(folder: Path, state: TrainerState, arrays: Any, save_model: Callable[[Path], None]) -> Path:
    """Write `checkpoint-<step>` into a training folder and return its path.

    Args:
        folder: the training folder.
        state: the progress.
        arrays: a tree of the arrays that resuming needs; None for a checkpoint that only holds the model.
        save_model: writes model and tokenizer into a folder.
    """
    path = folder / f"checkpoint-{state.global_step}"
    with replace_folder(path) as part:
        save_model(part)
        if arrays is not None:
            flat: dict[str, mx.array] = tree_flatten(arrays, destination={})  # type: ignore[assignment]
            write_safetensors(part / ARRAYS, dict(sorted(flat.items())))  # equal bytes after resuming
        (part / STATE).write_text(state.to_json(), encoding="utf-8")
        write_checksums(part)
    return path


def check_checkpoint(path: Path, advice: str | None = None) -> None:
    """Check that a folder is a training checkpoint whose files are as they were written.

    Args:
        path: the checkpoint.
        advice: what to do about a damaged one, for the message; by default `advice_on`.

    Raises:
        UserError: it is not a checkpoint, or a file is damaged or missing.
    """
    advice = advice or advice_on(path)
    if not any((path / name).exists() for name in (ARRAYS, STATE, CHECKSUMS)):
        raise UserError(f"{path} is not a training checkpoint to resume from. {advice}")
    if not (path / CHECKSUMS).exists():
        raise UserError(
            f"{path / CHECKSUMS} not found: the checkpoint is incomplete, or an earlier version wrote it. {advice}"
        )
    check_files(path, (ARRAYS, STATE), advice)


def advice_on(path: Path) -> str:
    """Return what to do about a damaged checkpoint."""
    return f"Remove {path} to resume from the checkpoint before it, or {path.parent} to start again."


def read_state(path: Path) -> TrainerState:
    """Return the progress stored in a checkpoint.

    Raises:
        UserError: the folder is not a training checkpoint, a file is damaged, or a value has the wrong type.
    """
    finish_replacing(path)
    check_checkpoint(path)
    file = path / STATE
    try:
        state = TrainerState(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}). {advice_on(path)}") from error
    _check_types(state, path)
    if state.best_model_checkpoint is not None:
        state.best_model_checkpoint = str(path.parent / state.best_model_checkpoint)
    return state


def _check_types(state: TrainerState, path: Path) -> None:
    """Raise UserError if a value of a state has the wrong type."""
    best = state.best_model_checkpoint
    is_name = isinstance(best, str) and NAME.fullmatch(best) is not None
    valid = {
        "log_history": (is_log(state.log_history), "a list of lines with a step"),
        "best_model_checkpoint": (best is None or is_name, "the name of a checkpoint or null"),
        "settings": (isinstance(state.settings, dict), "an object"),
        "callbacks": (isinstance(state.callbacks, dict), "an object"),
    }
    for name in ("best_metric", "best_checkpoint_metric"):
        value = getattr(state, name)
        valid[name] = (value is None or is_finite(value), "a finite number or null")
    for name in ("global_step", "epochs_done", "epoch_step", "tokens"):
        value = getattr(state, name)
        valid[name] = (type(value) is int and value >= 0, "a non-negative integer")
    for name in ("epoch", "loss_since_log", "total_loss"):
        valid[name] = (is_finite(getattr(state, name)), "a finite number")
    for name, (is_valid, what) in valid.items():
        if not is_valid:
            value = f"{getattr(state, name)!r:.80}"
            raise UserError(f"{path / STATE}: {name} must be {what}, got {value}. {advice_on(path)}")


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_log(value: Any) -> bool:
    """Return whether a value is a list of log lines."""
    return isinstance(value, list) and all(isinstance(line, dict) and type(line.get("step")) is int for line in value)


def read_arrays(path: Path, expected: Any) -> Any:
    """Return the tree of arrays stored in a checkpoint.

    Args:
        path: the checkpoint.
        expected: a tree of arrays with the names, shapes and dtypes that the checkpoint must have.

    Raises:
        UserError: the file is damaged, or belongs to a training of other parameters.
    """
    file = path / ARRAYS
    try:
        arrays = load_files([str(file)])
        mx.eval(arrays)
    except (OSError, CheckpointError, RuntimeError) as error:
        raise UserError(f"{file} is damaged ({error}). {advice_on(path)}") from error
    wanted: dict[str, mx.array] = tree_flatten(expected, destination={})  # type: ignore[assignment]
    # Weights come first: their names are those of the model's parameters.
    for name in sorted(wanted.keys() | arrays.keys(), key=lambda name: (not name.startswith("weights."), name)):
        found, now = (_described(tree, name) for tree in (arrays, wanted))
        if found != now:
            raise UserError(
                f"{file} does not fit this training: {name} is {found} there, {now} here. Resume with the model, the "
                "adapters and the frozen parameters of the first run."
            )
    return tree_unflatten(list(arrays.items()))


def _described(arrays: dict[str, mx.array], name: str) -> str:
    if name not in arrays:
        return "missing"
    return f"{str(arrays[name].dtype).removeprefix('mlx.core.')} of shape {arrays[name].shape}"


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
