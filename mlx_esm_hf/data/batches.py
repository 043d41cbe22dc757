"""Which windows go through a model together, and the arrays that it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.data.windows import Window


class Batch(NamedTuple):
    """Windows in one forward pass, a row each, padded on the right.

    `input_ids` and `attention_mask` are [windows, tokens]. The residues of a row begin at `first`.
    """

    windows: list[Window]
    input_ids: np.ndarray
    attention_mask: np.ndarray
    first: int


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of like length, longest first, in groups of at most `batch_tokens` tokens with padding.

    A row longer than the budget is a group of its own. The longest go first, so that a run that will not fit into
    memory fails at once.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and (len(group) + 1) * lengths[group[0]] > batch_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def make_batches(
    sequences: Sequence[np.ndarray], windows: Sequence[Window], vocabulary: Vocabulary, batch_tokens: int
) -> Iterator[Batch]:
    """The windows of sequences of ids, those of like length together.

    Args:
        batch_tokens: most tokens, with padding, of a batch.

    Raises:
        ValueError: a sequence holds the token for padding.
    """
    lengths = [window.length + vocabulary.around for window in windows]
    for rows in by_length(lengths, batch_tokens):
        width = max(lengths[row] for row in rows)
        input_ids = np.full((len(rows), width), vocabulary.pad, np.int32)
        attention_mask = np.zeros((len(rows), width), np.int32)
        for line, row in enumerate(rows):
            sequence, start, stop = windows[row]
            ids = [*vocabulary.before, *sequences[sequence][start:stop], *vocabulary.after]
            input_ids[line, : lengths[row]] = ids
            attention_mask[line, : lengths[row]] = 1
        if ((input_ids != vocabulary.pad) != attention_mask).any():
            raise ValueError("A sequence holds the token for padding.")
        yield Batch([windows[row] for row in rows], input_ids, attention_mask, len(vocabulary.before))
