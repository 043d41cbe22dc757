"""Which items of a data set go through the model together, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_esm_hf.data.batches import by_length

POOL = 64  # batches whose items are sorted by length together: enough for like lengths, few enough to stay random


def epoch_of(size: int, seed: int, epoch: int) -> np.ndarray:
    """All items of a data set of this size, shuffled: for one seed and epoch always alike."""
    return np.random.default_rng((seed, epoch)).permutation(size)


def rows_in_batches(items: Sequence[int] | np.ndarray, rows: int) -> list[np.ndarray]:
    """So many items to a batch, in their order; the last one may have fewer."""
    items = np.asarray(items)
    return [items[start : start + rows] for start in range(0, len(items), rows)]


def tokens_in_batches(
    items: np.ndarray, lengths: np.ndarray, tokens: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """As many items to a batch as make so many tokens with padding, of like length; the batches are shuffled.

    Args:
        items: in random order.
        lengths: tokens of each item of the data set.
    """
    pool = max(1, POOL * tokens // max(1, int(lengths[items].mean())))
    batches = []
    for start in range(0, len(items), pool):
        together = items[start : start + pool]
        batches += [together[group] for group in by_length(lengths[together].tolist(), tokens)]
    return [batches[place] for place in rng.permutation(len(batches))]
