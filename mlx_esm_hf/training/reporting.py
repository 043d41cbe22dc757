"""Trackers that receive the log of a training, through transformers' callbacks for them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mlx_esm_hf.checks import check_choices
from mlx_esm_hf.errors import UserError

if TYPE_CHECKING:
    from mlx_esm_hf.training.arguments import MLXTrainingArguments

# Name, transformers' callback, and the package to install. tensorboardX writes TensorBoard's files without torch.
TRACKERS = {
    "tensorboard": ("TensorBoardCallback", "tensorboardX"),
    "wandb": ("WandbCallback", "wandb"),
    "trackio": ("TrackioCallback", "trackio"),
}


def trackers(report_to: None | str | list[str]) -> list[str]:
    """Return the names of the trackers in `report_to`.

    Raises:
        UserError: a tracker is not supported.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    if names == ["all"]:
        return [name for name in TRACKERS if is_installed(name)]
    if names in ([], ["none"]):
        return []
    check_choices("report_to", names, [*TRACKERS, "all", "none"])
    return names


def is_installed(tracker: str) -> bool:
    """Return whether the package of a tracker is installed."""
    if tracker == "tensorboard" and find_spec("torch") and find_spec("tensorboard"):
        return True
    return find_spec(TRACKERS[tracker][1]) is not None


def tracker_callbacks(args: MLXTrainingArguments) -> list[Any]:
    """Return transformers' callback for each tracker in `report_to`.

    Raises:
        UserError: the package of a tracker is not installed.
    """
    for name in args.report_to or []:
        if not is_installed(name):
            package = TRACKERS[name][1]
            raise UserError(f"report_to={name!r} needs {package}, which is not installed: pip install {package}")
    if not args.report_to:
        return []
    from transformers import integrations

    callbacks = [getattr(integrations, TRACKERS[name][0])() for name in args.report_to]
    for callback in callbacks:
        if args.logging_dir is not None and hasattr(callback, "logging_dir"):
            callback.logging_dir = args.logging_dir
    return callbacks
