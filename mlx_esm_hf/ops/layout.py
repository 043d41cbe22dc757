"""How the tokens of a batch lie while they are computed, and which of them see each other."""

from __future__ import annotations

import mlx.core as mx
import numpy as np


class Layout:
    """The tokens of a batch [B, L], as they were given or packed.

    Packed, the real tokens lie in one row [1, T], sequence behind sequence, and each sequence sees itself: padding is
    not computed. A row of nothing but padding then has no tokens. A row is one sequence, or has several chains, each of
    which is one.

    Args:
        shape: (B, L).
        mask: bool [B, L], False at padding, whose keys no query then sees. A row of nothing but padding sees all of it,
            since a softmax over no keys would be 0 / 0. None, there is no padding.
        packed: the mask's values [B, L], to pack by them. Padding may stand on either side and between tokens.
        chains: whole numbers [B, L]. Tokens of a row that have the same one see each other, wherever they stand, and no
            others; so does padding, if it is computed.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        mask: mx.array | None = None,
        packed: np.ndarray | None = None,
        chains: mx.array | None = None,
    ):
        B, L = self.shape = shape
        self.packed = packed is not None
        # Which keys are seen, bool [B, L], of chains [B, L, L], by each query. A packed batch has nothing to hide.
        self.visible: mx.array | None = None
        if packed is None:
            self.offsets = list(range(0, B * L + 1, L))
            if chains is not None:
                self.visible = chains[:, :, None] == chains[:, None, :]
            elif mask is not None:
                self.visible = mask | ~mask.any(axis=1, keepdims=True)
            return
        places, lengths = np.flatnonzero(packed), packed.sum(axis=1)
        if chains is not None:
            numbers = np.stack([places // L, np.array(chains).ravel()[places]])
            _, sequence, lengths = np.unique(numbers, axis=1, return_inverse=True, return_counts=True)
            places = places[np.argsort(sequence, kind="stable")]
        # Sequence s is the tokens offsets[s] to offsets[s + 1] of the row.
        self.offsets = [0, *np.cumsum(lengths).tolist()]
        # For each place of the batch its token; for padding the row of zeros that `unpack` puts behind the last token.
        tokens = np.full(B * L, len(places), np.int32)
        tokens[places] = np.arange(len(places))
        self._places, self._tokens = mx.array(places.astype(np.int32)), mx.array(tokens.reshape(shape))

    def pack(self, x: mx.array) -> mx.array:
        """From the batch's places to those of computation: [B, L, ...] to [1, T, ...], or as it is."""
        return x.flatten(0, 1)[self._places][None] if self.packed else x

    def unpack(self, x: mx.array) -> mx.array:
        """The way back: [1, T, D] to [B, L, D], zero at padding, or as it is."""
        if not self.packed:
            return x
        nothing = mx.zeros((1, x.shape[-1]), dtype=x.dtype)
        return mx.concatenate([x[0], nothing])[self._tokens]
