"""Which items form the batches of an epoch, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.seeds import seed_libraries
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.datasets import batches_by_rows, batches_by_tokens, by_similar_length, shuffled_items


class EpochBatches:
    """The batches of each epoch, which depend only on the data, the arguments and the epoch.

    Args:
        data: a data set with a length.
        args: the settings.
        sampler: returns the indices of the items of an epoch in order, instead of a shuffled order.
    """

    def __init__(
        self,
        data: Any,
        args: MLXTrainingArguments,
        sampler: Callable[[], Iterable[int]] | None = None,
    ):
        self.data, self.args, self.sampler = data, args, sampler
        self.seed = shuffling_seed(args)
        groups_lengths = args.batch_tokens is not None or args.train_sampling_strategy == "group_by_length"
        self.lengths = token_lengths(data, args.length_column_name) if groups_lengths else None

    def __call__(self, epoch: int) -> list[np.ndarray]:
        """Return the item indices of each batch of an epoch.

        Raises:
            UserError: the epoch has no items.
        """
        args, items = self.args, self._items(epoch)
        if not len(items):
            raise UserError(f"Epoch {epoch} of the training data has no items: the sampling weights leave none.")
        if self.lengths is not None and args.batch_tokens is not None:
            rng = np.random.default_rng((self.seed, epoch, 1))
            return batches_by_tokens(items, self.lengths, args.batch_tokens, rng)
        rows = args.per_device_train_batch_size
        if self.lengths is not None:
            items = by_similar_length(items, self.lengths, rows * batches_per_step(args))
        batches = batches_by_rows(items, rows)
        if args.dataloader_drop_last and len(batches) > 1 and len(batches[-1]) < rows:
            batches.pop()
        return batches

    def _items(self, epoch: int) -> np.ndarray:
        """Return the indices of the items of an epoch in order."""
        if self.sampler is not None:
            seed_libraries(self.seed, epoch)
            return np.array([int(item) for item in self.sampler()], np.int64)
        if hasattr(self.data, "order"):
            return self.data.order(self.seed, epoch)
        if self.args.train_sampling_strategy == "sequential":
            return np.arange(len(self.data))
        return shuffled_items(len(self.data), self.seed, epoch)


def shuffling_seed(args: MLXTrainingArguments) -> int:
    """Return the seed of the order of items."""
    return args.seed if args.data_seed is None else args.data_seed


def seeded(batches: Iterable[Any], *numbers: int) -> Iterator[Any]:
    """Yield the batches of a data loader of the user.

    The random numbers of each depend only on its place and these numbers. A resumed training, which skips those of
    earlier steps, thus gets the same ones.
    """
    seed_libraries(*numbers)
    iterator = iter(batches)
    for place in count():
        seed_libraries(*numbers, place)
        try:
            batch = next(iterator)
        except StopIteration:
            return
        yield batch


def grouped(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of up to `size` items."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def batches_per_step(args: MLXTrainingArguments) -> int:
    """Return the batches of one optimizer step on all ranks together."""
    return args.gradient_accumulation_steps * distributed.size()


def token_lengths(data: Any, column: str = "length") -> np.ndarray:
    """Return the number of tokens of each item of a data set, int [items], from `lengths` or a column if it has one."""
    lengths = getattr(data, "lengths", None)
    if lengths is None:
        rows = (data[i] for i in range(len(data)))
        lengths = np.array([row[column] if column in row else len(row["input_ids"]) for row in rows])
    return lengths
