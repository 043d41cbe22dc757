"""The losses of a training as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from mlx_esm_hf.runs.outputs import check_outputs, check_picture, write_new
from mlx_esm_hf.training.trainer import LOG


def check_picture_of(path: Path | None) -> None:
    """
    Raises:
        ValueError: there is such a file, or it cannot be drawn.
    """
    check_picture(path)
    check_outputs(None, (), path)


def draw_losses(folder: Path, path: Path) -> None:
    """Draw the losses in the log of a training over the steps, those of the validation data beside them."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    write_new(path, lambda part: figure.savefig(part, dpi=150))
