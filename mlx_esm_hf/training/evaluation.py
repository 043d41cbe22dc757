"""What evaluation needs besides the model: losses from outputs, label smoothing, and the batches of all ranks."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX, as_array, check_labels
from mlx_esm_hf.runtime import distributed

Batch = dict[str, np.ndarray]


class Batches:
    """The batches of a data set in its order, read when they are needed. Each rank reads its own.

    Args:
        groups: item indices of each batch.
        collate: makes a batch of item indices.
    """

    def __init__(self, groups: Sequence[np.ndarray], collate: Callable[[np.ndarray], Batch]):
        self.groups, self.collate = groups, collate

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Batch]:
        yield from map(self.collate, self.groups)

    def of_rank(self) -> Iterator[Batch]:
        """Yield every n-th batch, where n is the number of ranks."""
        yield from map(self.collate, self.groups[distributed.rank() :: distributed.size()])


def batches_of_rank(dataloader: Iterable[Any], to_arrays: Callable[[Any], Batch]) -> Iterator[Batch]:
    """Yield the batches of this rank.

    Args:
        dataloader: `Batches`, or the batches of all ranks.
        to_arrays: makes NumPy arrays of a batch of another data loader.
    """
    if isinstance(dataloader, Batches):
        yield from dataloader.of_rank()
        return
    for number, batch in enumerate(dataloader):
        if number % distributed.size() == distributed.rank():
            yield to_arrays(batch)


def as_numpy(batch: Mapping[str, Any]) -> Batch:
    """Return the arrays of a batch, of torch, MLX or NumPy, as NumPy arrays.

    Raises:
        UserError: a column is not an array of numbers.
    """
    known = (np.ndarray, list)
    arrays = {name: np.asarray(x if isinstance(x, known) else as_array(x)) for name, x in batch.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise UserError(
                f"The column {name!r} of a batch must be an array of numbers, got {array.ravel()[:1].tolist()!r:.50}. "
                "Drop it from the items, or make an array of it in the data_collator."
            )
    return arrays


def loss_of(outputs: Any) -> Any:
    """Return the loss in the outputs of a model: a mapping with "loss", or a tuple that begins with it; None if none.

    A lone array is the loss itself.
    """
    if isinstance(outputs, mx.array):
        return outputs
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    return outputs[0] if outputs else None


def predictions_of(outputs: Any, ignore_keys: Sequence[str]) -> Any:
    """Return the outputs without the loss and these keys: one array, or a tuple."""
    if isinstance(outputs, mx.array):
        return None
    if isinstance(outputs, Mapping):
        kept = tuple(x for name, x in outputs.items() if name not in ("loss", *ignore_keys) and x is not None)
    else:
        kept = tuple(outputs[1:])
    return kept[0] if len(kept) == 1 else kept or None


def smoothed_loss(logits: mx.array, labels: mx.array, smoothing: float) -> mx.array:
    """Return the mean cross-entropy with labels mixed with a uniform distribution.

    Args:
        logits: [..., classes].
        labels: [...], −100 to exclude.
        smoothing: share of the uniform distribution.

    Raises:
        UserError: the labels are not integers, have another shape, or are outside 0 to classes − 1.

    Source: Szegedy et al. 2016, section 7; transformers' `LabelSmoother`.
    """
    if not mx.issubdtype(labels.dtype, mx.integer):
        raise UserError(
            f"label_smoothing_factor needs class labels, which are integers, got {labels.dtype}. Set it to 0 for a "
            "regression or several labels per sequence."
        )
    labels = check_labels(labels, logits, IGNORE_INDEX)
    logits = logits.astype(mx.float32)
    log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    counted = labels != IGNORE_INDEX
    chosen = mx.take_along_axis(log_probabilities, mx.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    losses = -(1 - smoothing) * chosen - smoothing * log_probabilities.mean(axis=-1)
    return mx.where(counted, losses, 0).sum() / counted.sum()


def plain_numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics with NumPy's and MLX's numbers as Python's, which JSON can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic | np.ndarray | mx.array):
            return value.item() if value.size == 1 else value.tolist()
        return value

    return {name: tree_map(plain, value) for name, value in metrics.items()}


def gather(rows: list[Any], step: int) -> list[Any]:
    """Return the rows of all ranks, in the order of the data. Rank r of n has every n-th row from r on.

    Args:
        rows: trees of NumPy arrays of this rank.
        step: see `runtime.distributed.gather`.
    """
    if distributed.size() == 1:
        return rows
    file, named = io.BytesIO(), dict[str, np.ndarray]()
    for number, row in enumerate(rows):
        arrays: Any = tree_flatten(row)
        named |= {f"{number}.{name}": array for name, array in arrays}
    np.savez(file, **named)  # type: ignore[arg-type]
    parts = []
    for data in distributed.gather(file.getvalue(), step):
        part = np.load(io.BytesIO(data))
        numbers = sorted({int(name.partition(".")[0]) for name in part.files})
        trees = ([(n.partition(".")[2], part[n]) for n in part.files if n.startswith(f"{k}.")] for k in numbers)
        parts.append([tree_unflatten(tree) for tree in trees])
    total = sum(map(len, parts))
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]


def joined(rows: Sequence[Any]) -> Any:
    """Concatenate trees of arrays along their first axis, padding shorter rows with −100."""
    if not rows or rows[0] is None:
        return None
    if isinstance(rows[0], tuple | list):
        return tuple(joined(parts) for parts in zip(*rows, strict=True))
    if isinstance(rows[0], dict):
        return {name: joined([row[name] for row in rows]) for name in rows[0]}
    return join(rows)


def join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate the rows of several batches, padding shorter rows with −100."""
    if arrays[0].ndim < 2:
        return np.concatenate(arrays)
    width = max(x.shape[1] for x in arrays)
    padded = [
        np.pad(x, [(0, 0), (0, width - x.shape[1]), *[(0, 0)] * (x.ndim - 2)], constant_values=IGNORE_INDEX)
        for x in arrays
    ]
    return np.concatenate(padded)
