"""Seeding all random number generators that a script uses."""

from __future__ import annotations

import random
import sys

import mlx.core as mx
import numpy as np

from mlx_esm_hf.checks import check_integer

MOST = (1 << 32) - 1  # NumPy's maximum


def set_seed(seed: int) -> None:
    """Seed `random`, NumPy and MLX, like transformers' function of the same name, which does not seed MLX.

    New heads, dropout and shuffling then repeat.

    Args:
        seed: from 0 to 2³² − 1.

    Raises:
        UserError: `seed` is out of range.

    Example:
        >>> set_seed(42)
    """
    check_integer("seed", seed, 0, MOST)
    random.seed(seed)
    np.random.seed(seed)
    mx.random.seed(seed)


def seed_libraries(*numbers: int) -> None:
    """Seed `random`, NumPy and, if it is imported, torch, but not MLX.

    Collators, samplers and data loaders then repeat for the same numbers, such as a seed and an epoch.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch = sys.modules.get("torch")  # None also if its import was blocked
    if torch is not None:
        torch.manual_seed(seed)
