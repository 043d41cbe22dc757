"""The losses of a training as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import mlx_esm_hf.plots as plots
from mlx_esm_hf.runs.outputs import write_new
from mlx_esm_hf.training.evaluator import LOG


def draw_losses(folder: Path, path: Path) -> None:
    """Write the losses in the log of a training as a picture."""
    log = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    figure = plots.loss_curves(log)
    write_new(path, lambda part: figure.savefig(part, dpi=plots.DPI))
