"""The small ESM-2 that comes with the package, for trying things out where there is no network and no patience.

`examples/train_demo_model.py` made it; `README.md` in this folder is its card.
"""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def demo_model() -> str:
    """The folder of the model, for `from_pretrained` and `--model demo`. Says each time that it is no real model."""
    logger.warning(
        "The demo model is for trying things out: it knows little about proteins. For answers name a real one, such as "
        "facebook/esm2_t33_650M_UR50D."
    )
    return str(Path(__file__).parent)
