"""A padded batch without its padding."""

from __future__ import annotations

import mlx.core as mx
import numpy as np


class Packing:
    """The tokens of a padded batch that are real, one sequence behind the other.

    Args:
        mask: bool [B, L], True for tokens. Padding may stand on either side, and between tokens, too.

    Sequence s is the tokens `offsets[s]` to `offsets[s + 1]` of a packed array; a row of nothing but padding has none.
    """

    def __init__(self, mask: np.ndarray):
        self.offsets: list[int] = [0, *np.cumsum(mask.sum(axis=1)).tolist()]
        self.places = mx.array(np.flatnonzero(mask).astype(np.int32))
        # For each place of the batch its token's; for padding the row behind the last token.
        self.tokens = mx.array(
            np.where(mask, np.cumsum(mask).reshape(mask.shape) - 1, self.offsets[-1]).astype(np.int32)
        )

    def pack(self, x: mx.array) -> mx.array:
        """[B, L, ...] to [1, tokens, ...]"""
        return x.flatten(0, 1)[self.places][None]

    def unpack(self, x: mx.array) -> mx.array:
        """[1, tokens, D] to [B, L, D], zero at padding."""
        nothing = mx.zeros((1, x.shape[-1]), dtype=x.dtype)
        return mx.concatenate([x[0], nothing])[self.tokens]
