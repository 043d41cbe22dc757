"""The arrangement of a batch's tokens during computation, and which tokens see each other."""

from __future__ import annotations

import mlx.core as mx
import numpy as np


class Layout:
    """The tokens of a batch [B, L], either padded or packed.

    A packed batch holds the real tokens in one row [1, T], one sequence after another, and each sequence attends to
    itself. Padding is not computed. A row is one sequence, or several chains that are sequences of their own.

    Args:
        shape: (B, L).
        mask: bool [B, L], False at padding, which is hidden as a key. A row of nothing but padding sees all of itself,
            since a softmax over no keys would be 0 / 0. None if there is no padding.
        packed: the values of the mask [B, L], to pack the batch by. Padding may be on either side or between tokens.
        chains: integers [B, L]. Tokens of a row see each other only if their numbers are equal. This includes padding,
            if it is computed.
        show_padding: keep outputs at padding, which are otherwise 0.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        mask: mx.array | None = None,
        packed: np.ndarray | None = None,
        chains: mx.array | None = None,
        show_padding: bool = False,
    ):
        B, L = self.shape = shape
        self.packed = packed is not None
        self._shown = None if packed is not None or show_padding else mask
        # The keys that each query sees, bool [B, L], or [B, L, L] with chains. None in a packed batch.
        self.visible: mx.array | None = None
        if packed is None:
            self.offsets = list(range(0, B * L + 1, L))
            if chains is not None:
                self.visible = chains[:, :, None] == chains[:, None, :]
            elif mask is not None:
                self.visible = mask | ~mask.any(axis=1, keepdims=True)
            return
        positions, lengths = np.flatnonzero(packed), packed.sum(axis=1)
        if chains is not None:
            row_and_chain = np.stack([positions // L, np.array(chains).ravel()[positions]])
            _, sequence, lengths = np.unique(row_and_chain, axis=1, return_inverse=True, return_counts=True)
            positions = positions[np.argsort(sequence, kind="stable")]
        # Sequence s is tokens offsets[s] to offsets[s + 1] of the packed row.
        self.offsets = [0, *np.cumsum(lengths).tolist()]
        # The packed index of each batch position. Padding points at the zero row that `unpack` appends.
        tokens = np.full(B * L, len(positions), np.int32)
        tokens[positions] = np.arange(len(positions))
        self._positions, self._tokens = mx.array(positions.astype(np.int32)), mx.array(tokens.reshape(shape))

    def pack(self, x: mx.array) -> mx.array:
        """Return x [B, L, ...] as [1, T, ...] if the batch is packed, else unchanged."""
        return x.flatten(0, 1)[self._positions][None] if self.packed else x

    def unpack(self, x: mx.array) -> mx.array:
        """Return packed x [1, T, D] as [B, L, D] with zeros at padding. Without packing, return x unchanged."""
        if not self.packed:
            return x
        zero_row = mx.zeros((1, x.shape[-1]), dtype=x.dtype)
        return mx.concatenate([x[0], zero_row])[self._tokens]

    def zero_padding(self, x: mx.array) -> mx.array:
        """Return unpacked x [B, L, D] with zeros at padding, as if it had been packed."""
        return x if self._shown is None else mx.where(self._shown[..., None], x, 0)
