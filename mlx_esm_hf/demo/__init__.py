"""A small ESM-2 included in the package, for trying things out without a download.

`examples/train_demo_model.py` trained it; `README.md` in this folder is its model card.
"""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def demo_model() -> str:
    """Return the demo model's folder, for `from_pretrained` and `--model demo`, and log that it is only a demo."""
    logger.warning(
        "The demo model is for trying things out: it knows little about proteins. For real results use a published "
        "model, such as facebook/esm2_t33_650M_UR50D."
    )
    return str(Path(__file__).parent)
