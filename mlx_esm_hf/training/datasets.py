"""What is trained with: proteins whose residues are hidden, and tables of proteins with labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX
from mlx_esm_hf.training.objective import corrupt
from mlx_esm_hf.training.order import epoch_of
from mlx_esm_hf.training.token_store import TokenStore

Feature = dict[str, np.ndarray]


class MaskedProteins:
    """A data set for a masked language model: of each protein a random piece of the context's length, corrupted.

    What becomes of a protein depends on the seed, the epoch and its number alone: not on the order, nor on who asks.

    Args:
        stores: pairs of a store and the numbers of its proteins that take part.
        vocabulary: of the model.
        context: most tokens of a piece, those around the residues among them.
        seed: of pieces and masks.
        weights: how often each store is drawn from, in relation to the others; by default each by its size.

    Attributes:
        lengths: tokens of each piece, int64 [proteins].
    """

    def __init__(
        self,
        stores: Sequence[tuple[TokenStore, np.ndarray]],
        vocabulary: Vocabulary,
        context: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
    ):
        self.stores, self.vocabulary, self.context, self.seed = list(stores), vocabulary, context, seed
        sizes = [len(numbers) for _, numbers in self.stores]
        self._ends = np.cumsum(sizes)
        residues = np.concatenate([store.lengths[numbers] for store, numbers in self.stores])
        self.lengths = np.minimum(residues + vocabulary.around, context)
        self.weights = None if weights is None else np.array(weights) / np.sum(weights)
        self.epoch = 0

    def __len__(self) -> int:
        return int(self._ends[-1])

    def set_epoch(self, epoch: int) -> None:
        """The next pieces and masks are those of this epoch."""
        self.epoch = epoch

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The proteins of an epoch, shuffled: all of them; with weights as many in all, of each store as its weight
        says, over and over where that is more than it has."""
        if self.weights is None:
            return epoch_of(len(self), seed, epoch)
        drawn = []
        starts = [0, *self._ends[:-1]]
        for part, (start, end, weight) in enumerate(zip(starts, self._ends, self.weights, strict=True)):
            wanted = round(weight * len(self))
            first = epoch * wanted  # how many were taken in the epochs before
            size = end - start
            rounds = range(first // size, (first + wanted - 1) // size + 1)
            taken = np.concatenate([epoch_of(size, seed + part, r) for r in rounds] or [np.empty(0, np.int64)])
            offset = first - rounds.start * size
            drawn.append(start + taken[offset : offset + wanted])
        everything = np.concatenate(drawn)
        return everything[epoch_of(len(everything), seed, epoch)]

    def __getitem__(self, number: int) -> Feature:
        """`input_ids` and `labels` of a piece, int32 [tokens], with the tokens around it."""
        number = int(number)
        part = int(np.searchsorted(self._ends, number, side="right"))
        store, numbers = self.stores[part]
        ids = store[numbers[number - (self._ends[part - 1] if part else 0)]]
        rng = np.random.default_rng((self.seed, self.epoch, number))
        room = self.context - self.vocabulary.around
        start = int(rng.integers(0, max(0, len(ids) - room) + 1))
        inputs, labels = corrupt(ids[start : start + room], self.vocabulary, rng)
        before, after = self.vocabulary.before, self.vocabulary.after
        return {
            "input_ids": np.array([*before, *inputs, *after], np.int32),
            "labels": np.array([*[IGNORE_INDEX] * len(before), *labels, *[IGNORE_INDEX] * len(after)], np.int32),
        }


def pad(features: Sequence[Feature], padding: int) -> Feature:
    """Rows as one batch: `input_ids`, `attention_mask` and `labels`, int32 [rows, tokens], padded on the right."""
    shape = (len(features), max(len(feature["input_ids"]) for feature in features))
    batch = {
        "input_ids": np.full(shape, padding, np.int32),
        "attention_mask": np.zeros(shape, np.int32),
        "labels": np.full(shape, IGNORE_INDEX, np.int32),
    }
    for row, feature in enumerate(features):
        length = len(feature["input_ids"])
        batch["input_ids"][row, :length] = feature["input_ids"]
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, :length] = feature["labels"]
    return batch
