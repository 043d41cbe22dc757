"""The data set for a masked language model, and the order in which items form batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_esm_hf.data.batches import by_length
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX
from mlx_esm_hf.training.token_store import TokenStore

# 15% of the residues are selected: 80% of them become <mask>, 10% a random residue, and 10% stay (as in BERT).
SELECTED, MASKED, REPLACED = 0.15, 0.8, 0.1

POOL = 64  # batches whose items are sorted together: enough for similar lengths, few enough to stay random

Feature = dict[str, np.ndarray]


class MaskedProteins:
    """A data set for a masked language model: a random crop of each protein, with masked residues.

    Cropping and masking depend only on (seed, epoch, index), not on the order of access.

    Args:
        stores: pairs of a store and the indices of the proteins to use from it.
        vocabulary: the model's vocabulary.
        context: maximum number of tokens of a crop, special tokens included.
        seed: seed of cropping and masking.
        weights: relative sampling frequency of each store; by default proportional to its size.

    Attributes:
        lengths: tokens of each crop, int64 [proteins].
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
        sizes = [len(indices) for _, indices in self.stores]
        self._ends = np.cumsum(sizes)
        residues = np.concatenate([store.lengths[indices] for store, indices in self.stores])
        self.lengths = np.minimum(residues + vocabulary.around, context)
        self.weights = None if weights is None else np.array(weights) / np.sum(weights)
        self.epoch = 0

    def __len__(self) -> int:
        return int(self._ends[-1])

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that determines the crops and masks."""
        self.epoch = epoch

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the indices of the proteins of an epoch, shuffled.

        Without weights these are all proteins. With weights the epoch has the same length, and each store contributes
        its share. A store smaller than its share is repeated, and continues in the next epoch where it stopped.
        """
        if self.weights is None:
            return shuffled_items(len(self), seed, epoch)
        drawn = []
        starts = [0, *self._ends[:-1]]
        for part, (start, end, weight) in enumerate(zip(starts, self._ends, self.weights, strict=True)):
            wanted = round(weight * len(self))
            first = epoch * wanted  # how many were drawn in earlier epochs
            size = end - start
            rounds = range(first // size, (first + wanted - 1) // size + 1)
            shuffled = np.concatenate([shuffled_items(size, seed + part, r) for r in rounds] or [np.empty(0, np.int64)])
            offset = first - rounds.start * size
            drawn.append(start + shuffled[offset : offset + wanted])
        items = np.concatenate(drawn)
        return items[shuffled_items(len(items), seed, epoch)]

    def __getitem__(self, index: int) -> Feature:
        """Return `input_ids` and `labels` of a crop, special tokens included, int32 [tokens]."""
        index = int(index)
        part = int(np.searchsorted(self._ends, index, side="right"))
        store, indices = self.stores[part]
        ids = store[indices[index - (self._ends[part - 1] if part else 0)]]
        rng = np.random.default_rng((self.seed, self.epoch, index))
        room = self.context - self.vocabulary.around
        start = int(rng.integers(0, max(0, len(ids) - room) + 1))
        inputs, labels = mask_residues(ids[start : start + room], self.vocabulary, rng)
        before, after = self.vocabulary.before, self.vocabulary.after
        return {
            "input_ids": np.array([*before, *inputs, *after], np.int32),
            "labels": np.array([*[IGNORE_INDEX] * len(before), *labels, *[IGNORE_INDEX] * len(after)], np.int32),
        }


def mask_residues(ids: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mask or replace random residues. Gaps, X and special tokens stay as they are.

    A pair of a residue and a structure letter keeps its letter where its residue is masked or replaced, as in SaProt.

    Args:
        ids: token ids, int32 [positions].
        vocabulary: the model's vocabulary.
        rng: source of randomness.

    Returns:
        (input ids, labels), int32 [positions] each; the label is −100 where nothing was selected.

    Source: Rives et al. 2021, Methods; Devlin et al. 2019, section 3.1.
    """
    selected = np.isin(ids, vocabulary.predicted) & (rng.random(len(ids)) < SELECTED)
    fate = rng.random(len(ids))
    random_residues = rng.choice(vocabulary.standard, len(ids))
    inputs = np.where(selected & (fate < MASKED), vocabulary.masked(ids), ids)
    places = selected & (fate >= MASKED) & (fate < MASKED + REPLACED)
    inputs[places] = vocabulary.replaced(ids[places], random_residues[places])
    return inputs.astype(np.int32), np.where(selected, ids, IGNORE_INDEX).astype(np.int32)


def pad(features: Sequence[Feature], padding: int) -> Feature:
    """Return one batch: `input_ids`, `attention_mask` and `labels`, int32 [rows, tokens], padded on the right."""
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


def shuffled_items(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the indices 0 to size − 1 in an order that depends only on (size, seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(size)


def batches_by_rows(items: Sequence[int] | np.ndarray, rows: int) -> list[np.ndarray]:
    """Divide items into batches of `rows`, in their order. The last batch may be smaller."""
    items = np.asarray(items)
    return [items[start : start + rows] for start in range(0, len(items), rows)]


def by_similar_length(items: np.ndarray, lengths: np.ndarray, batch: int) -> np.ndarray:
    """Return items in an order that puts similar lengths together, within blocks of 50 batches. The longest are first.

    Args:
        items: indices in random order.
        lengths: tokens of each item of the data set.
        batch: items of a step.

    Source: transformers' `LengthGroupedSampler`.
    """
    size = 50 * batch
    blocks = [items[start : start + size] for start in range(0, len(items), size)]
    blocks = [block[np.argsort(-lengths[block], kind="stable")] for block in blocks]
    first = int(np.argmax([lengths[block[0]] for block in blocks]))
    return np.concatenate([blocks[first], *blocks[:first], *blocks[first + 1 :]])


def batches_by_tokens(
    items: np.ndarray, lengths: np.ndarray, tokens: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Divide items into batches of similar lengths with at most `tokens` tokens, padding included.

    Args:
        items: indices in random order.
        lengths: tokens of each item of the data set.
        tokens: maximum tokens of a batch. A longer item forms a batch of its own.
        rng: shuffles the batches.
    """
    pool_size = max(1, POOL * tokens // max(1, int(lengths[items].mean())))
    batches = []
    for start in range(0, len(items), pool_size):
        pool = items[start : start + pool_size]
        batches += [pool[group] for group in by_length(lengths[pool].tolist(), tokens)]
    return [batches[i] for i in rng.permutation(len(batches))]
