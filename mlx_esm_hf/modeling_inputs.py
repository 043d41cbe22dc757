"""What is given to a model: made into `mx.array`, and checked while its values are at hand.

MLX gathers do not check their indices: a token id or a position outside its table silently reads other memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runtime.process import check_process

IGNORE_INDEX = -100  # the label of a token that is left out of the loss


def as_array(x: Any) -> Any:
    """`x`, a list, a NumPy array, a torch tensor or an `mx.array`, as `mx.array`; None stays None."""
    if x is None or isinstance(x, mx.array):
        return x
    if hasattr(x, "detach"):  # a torch tensor; NumPy has no bfloat16
        x = x.detach().cpu()
        x = (x if str(x.dtype) != "torch.bfloat16" else x.float()).numpy()
    try:
        x = np.asarray(x)
    except ValueError as error:
        raise UserError("The rows have different lengths: tokenize with padding=True.") from error
    if x.dtype == object:
        raise UserError(f"{x.tolist()!r:.100} is no array of numbers.")
    return mx.array(x)


def to_numpy(x: mx.array | None) -> np.ndarray | None:
    """The values of `x`, or None while it is being traced by `mx.compile` or `mx.vmap`, where it has none yet."""
    try:
        return None if x is None else np.array(x)
    except ValueError:
        return None


class Tables(NamedTuple):
    """The sizes that inputs have to fit.

    Args:
        vocab_size: rows of the embedding table.
        hidden_size: D.
        padding_idx: the id of the padding token.
        position_rows: rows of a learned position table, whose first `padding_idx` + 1 belong to no token; None, the
            model has no such table.
    """

    vocab_size: int
    hidden_size: int
    padding_idx: int
    position_rows: int | None = None


class Inputs(NamedTuple):
    """The arguments of a forward pass as arrays."""

    shape: tuple[int, int]  # (B, L)
    input_ids: mx.array | None  # int32 [B, L]
    inputs_embeds: mx.array | None  # [B, L, D]
    position_ids: mx.array | None  # [B, L] or [1, L]
    attention_mask: mx.array | None  # [B, L]; None where there is no padding
    mask_values: np.ndarray | None  # of the mask, read once; None where there is no padding, or while it is traced


def check_inputs(input_ids: Any, attention_mask: Any, position_ids: Any, inputs_embeds: Any, tables: Tables) -> Inputs:
    """Make arrays of the arguments of a forward pass.

    Raises:
        ValueError: neither or both of `input_ids` and `inputs_embeds`, an empty batch, shapes that do not fit, ids
            outside the vocabulary, a row longer than the position table, a mask of anything but 1 and 0. Values are
            checked where they are at hand, not while the call is being traced.
        RuntimeError: this process was forked from one that has made a model.
    """
    check_process()
    if (input_ids is None) == (inputs_embeds is None):
        raise UserError("You must specify exactly one of input_ids or inputs_embeds")
    input_ids, inputs_embeds = as_array(input_ids), as_array(inputs_embeds)
    shape = _shape_of(input_ids, inputs_embeds, tables.hidden_size)
    attention_mask, mask_values = _check_mask(as_array(attention_mask), shape)
    if input_ids is not None:
        _check_ids(input_ids, tables, counts_positions=position_ids is None)
        input_ids = input_ids.astype(mx.int32)
    position_ids = _check_positions(as_array(position_ids), shape, tables.position_rows)
    return Inputs(shape, input_ids, inputs_embeds, position_ids, attention_mask, mask_values)


def _shape_of(input_ids: mx.array | None, inputs_embeds: mx.array | None, hidden_size: int) -> tuple[int, int]:
    if input_ids is not None:
        if input_ids.ndim != 2:
            raise UserError(f"input_ids must be [batch, length], not of shape {input_ids.shape}.")
        B, L = input_ids.shape
    else:
        assert inputs_embeds is not None
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != hidden_size:
            raise UserError(
                f"inputs_embeds must be [batch, length, {hidden_size}], not of shape {inputs_embeds.shape}."
            )
        B, L, _ = inputs_embeds.shape
    if B == 0 or L == 0:
        raise UserError(f"The batch is empty: its shape is {(B, L)}.")
    return B, L


def _check_mask(attention_mask: mx.array | None, shape: tuple[int, int]) -> tuple[mx.array | None, np.ndarray | None]:
    """The mask and its values; neither where there is no padding."""
    if attention_mask is None:
        return None, None
    if attention_mask.shape != shape:
        raise UserError(f"attention_mask has the shape {attention_mask.shape}, the input {shape}.")
    values = to_numpy(attention_mask)
    if values is None:
        return attention_mask, None
    if not np.isin(values, (0, 1)).all():
        raise UserError("attention_mask must hold 1 for tokens and 0 for padding, and nothing else.")
    return (None, None) if values.all() else (attention_mask, values)


def _check_ids(input_ids: mx.array, tables: Tables, counts_positions: bool) -> None:
    if not mx.issubdtype(input_ids.dtype, mx.integer):
        raise UserError(f"input_ids must be whole numbers, not {input_ids.dtype}.")
    ids = to_numpy(input_ids)
    if ids is None:
        return
    outside = (ids < 0) | (ids >= tables.vocab_size)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise UserError(
            f"input_ids[{row}, {column}] is {ids[row, column]}: not a token of the vocabulary, which has "
            f"{tables.vocab_size}. Use the tokenizer that belongs to the checkpoint."
        )
    if tables.position_rows is not None and counts_positions:
        lengths = (ids != tables.padding_idx).sum(axis=1)
        longest = tables.position_rows - tables.padding_idx - 1
        if lengths.max() > longest:
            raise UserError(
                f"Row {lengths.argmax()} has {lengths.max()} tokens, the position table of this model ends at "
                f"{longest}, special tokens included. Truncate or split the sequence, or use a model that has no "
                "such table."
            )


def _check_positions(
    position_ids: mx.array | None, shape: tuple[int, int], position_rows: int | None
) -> mx.array | None:
    if position_ids is None:
        return None
    if position_ids.ndim == 1:
        position_ids = position_ids[None]
    if position_ids.shape not in (shape, (1, shape[1])):
        raise UserError(f"position_ids have the shape {position_ids.shape}, the input {shape}.")
    positions = to_numpy(position_ids)
    if position_rows is None or positions is None:
        return position_ids
    if positions.min() < 0 or positions.max() >= position_rows:
        raise UserError(
            f"position_ids reach from {positions.min()} to {positions.max()}; the position table has the rows 0 to "
            f"{position_rows - 1}."
        )
    return position_ids


def check_sequence_id(sequence_id: Any, shape: tuple[int, int]) -> mx.array:
    """The numbers of the tokens' chains as an array [B, L], −1 at padding.

    Raises:
        ValueError: another shape, or anything but whole numbers.
    """
    sequence_id = as_array(sequence_id)
    if sequence_id.shape != shape:
        raise UserError(f"sequence_id has the shape {sequence_id.shape}, the input {shape}.")
    if not mx.issubdtype(sequence_id.dtype, mx.integer):
        raise UserError(
            f"sequence_id must be whole numbers, the chain of each token and -1 at padding, not {sequence_id.dtype}."
        )
    return sequence_id


def labels_at(labels: Any, places: np.ndarray) -> bool:
    """Whether tokens at `places` (bool [B, L]) have a label, or may have one: while labels are traced, nobody knows."""
    if labels is None:
        return False
    values = to_numpy(as_array(labels))
    return values is None or values.shape != places.shape or bool((values[places] != IGNORE_INDEX).any())


def check_labels(labels: Any, logits: mx.array, ignore_index: int) -> mx.array:
    """Labels of classes as an array [...] for logits [..., C].

    Raises:
        ValueError: labels that do not fit the logits, or a class that there is none of.
    """
    labels = as_array(labels)
    if labels.size != logits.size // logits.shape[-1]:
        raise UserError(f"labels have the shape {labels.shape}, the logits {logits.shape}: one label a row is needed.")
    if not mx.issubdtype(labels.dtype, mx.integer):
        raise UserError(f"labels of classes must be whole numbers, not {labels.dtype}.")
    values = to_numpy(labels)
    if values is not None:
        outside = (values != ignore_index) & ((values < 0) | (values >= logits.shape[-1]))
        if outside.any():
            raise UserError(
                f"The label {values[outside][0]} is not one of the {logits.shape[-1]} classes (0 to "
                f"{logits.shape[-1] - 1}) nor {ignore_index}, which is left out of the loss."
            )
    return labels.reshape(logits.shape[:-1]).astype(mx.int32)
