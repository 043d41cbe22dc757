"""A small ESM-2 included in the package, for trying things out without a download.

`examples/train_demo_model.py` trained it; `README.md` in this folder is its model card.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = str(Path(__file__).parent)
NAME = "demo"  # on the command line, and in whatever is written

NOTICE = (
    "The demo model is for trying things out: it knows little about proteins; for real results use a published model, "
    "such as facebook/esm2_t33_650M_UR50D."
)


def demo_model() -> str:
    """Return the demo model's folder, for `from_pretrained` and `--model demo`. Loading it logs that it is a demo."""
    return FOLDER


def shown_name(model: str | os.PathLike[str]) -> str:
    """Return what tables, manifests and messages call a model: "demo", or the Hub id or folder as it was passed."""
    return NAME if os.fspath(model) == FOLDER else os.fspath(model)
