"""Which windows go through a model together, and the arrays that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.data.windows import Window
from mlx_esm_hf.errors import UserError


class Batch(NamedTuple):
    """Windows in one forward pass, a row each, padded on the right.

    `input_ids` and `attention_mask` are [windows, tokens]. The residues of a row begin at `first`.
    """

    windows: list[Window]
    input_ids: np.ndarray
    attention_mask: np.ndarray
    first: int


RowCost = Callable[[int], float]  # of a row of so many tokens, padding with it, where starting a batch costs 1


def by_length(lengths: Sequence[int], batch_tokens: int, row_cost: RowCost | None = None) -> list[list[int]]:
    """Indices of rows of like length, in groups of at most `batch_tokens` tokens with padding that cost least together.

    A row longer than the budget is a group of its own. The longest go first, so that one that will not fit into memory
    fails at once.

    Args:
        row_cost: None, a row costs nothing: there are as few groups as can be.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # Of the first so many rows in this order: what they cost at least, and where the last of their groups begins.
    least, begins = np.full(len(order) + 1, np.inf), np.zeros(len(order) + 1, np.int64)
    least[0] = 0
    for begin, row in enumerate(order):
        most = max(1, batch_tokens // max(1, lengths[row]))
        ends = slice(begin + 1, begin + 1 + most)
        cost = 0.0 if row_cost is None else row_cost(lengths[row])
        costs = least[begin] + 1 + cost * np.arange(1, len(least[ends]) + 1)
        better = costs <= least[ends]
        least[ends][better], begins[ends][better] = costs[better], begin
    groups, end = [], len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]


def make_batches(
    sequences: Sequence[np.ndarray],
    windows: Sequence[Window],
    vocabulary: Vocabulary,
    batch_tokens: int,
    row_cost: RowCost | None = None,
) -> Iterator[Batch]:
    """The windows of sequences of ids, those of like length together.

    Args:
        batch_tokens: most tokens, with padding, of a batch.
        row_cost: of a row; see `by_length`.

    Raises:
        ValueError: a sequence holds the token for padding.
    """
    lengths = [window.length + vocabulary.around for window in windows]
    for rows in by_length(lengths, batch_tokens, row_cost):
        width = max(lengths[row] for row in rows)
        input_ids = np.full((len(rows), width), vocabulary.pad, np.int32)
        attention_mask = np.zeros((len(rows), width), np.int32)
        for line, row in enumerate(rows):
            sequence, start, stop = windows[row]
            ids = [*vocabulary.before, *sequences[sequence][start:stop], *vocabulary.after]
            input_ids[line, : lengths[row]] = ids
            attention_mask[line, : lengths[row]] = 1
        if ((input_ids != vocabulary.pad) != attention_mask).any():
            raise UserError("A sequence holds the token for padding.")
        yield Batch([windows[row] for row in rows], input_ids, attention_mask, len(vocabulary.before))
