"""Grouping windows into padded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.data.windows import Window
from mlx_esm_hf.errors import UserError


class Batch(NamedTuple):
    """Windows in one forward pass, one per row, padded on the right.

    Attributes:
        windows: the window of each row.
        input_ids: [windows, tokens], int32.
        attention_mask: [windows, tokens], int32; 0 at padding.
        first: column of the first residue of each row.
    """

    windows: list[Window]
    input_ids: np.ndarray
    attention_mask: np.ndarray
    first: int


# Cost of a row of n tokens, padding included, relative to the cost of launching a batch.
RowCost = Callable[[int], float]


def by_length(lengths: Sequence[int], batch_tokens: int, row_cost: RowCost | None = None) -> list[list[int]]:
    """Group rows of similar length so that the total cost of the groups is minimal.

    A row longer than `batch_tokens` is a group of its own. The longest rows come first, so that a row that does not fit
    into memory fails at once.

    Args:
        lengths: tokens of each row.
        batch_tokens: maximum tokens of a group, padding included.
        row_cost: cost of a row by its padded length; None for no cost, which gives the fewest groups possible.

    Returns:
        The groups, each a list of indices into `lengths`.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # least[n] is the minimum cost of the n longest rows; begins[n] is where the last group of that optimum begins.
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
    """Yield windows of sequences in padded batches of similar length.

    Args:
        sequences: token ids [positions] of each protein.
        windows: the windows to batch.
        vocabulary: adds the special tokens and the padding.
        batch_tokens: maximum tokens of a batch, padding included.
        row_cost: see `by_length`.

    Raises:
        UserError: a sequence contains the padding token.
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
            raise UserError("A sequence contains the padding token.")
        yield Batch([windows[row] for row in rows], input_ids, attention_mask, len(vocabulary.before))
