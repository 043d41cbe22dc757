"""Convert the arguments of a model to `mx.array` and check them.

MLX does not check the indices of a gather: a token id or position outside its table silently reads other memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runtime.process import check_process

NUMBERS = "biufc"  # NumPy's kinds of dtypes: bool, signed and unsigned integers, floats, complex
IGNORE_INDEX = -100  # label of tokens excluded from the loss


def as_array(x: Any) -> Any:
    """Convert a list, NumPy array, torch tensor or `mx.array` to `mx.array`; None stays None.

    Raises:
        UserError: `x` is text, a dict of inputs, or something else that is not an array of numbers.
    """
    if x is None or isinstance(x, mx.array):
        return x
    if isinstance(x, Mapping):  # the result of a tokenizer
        raise UserError(
            f"Expected an array of numbers, got a {type(x).__name__}. Unpack what a tokenizer returns: model(**inputs)."
        )
    if hasattr(x, "detach"):  # a torch tensor; NumPy has no bfloat16
        x = x.detach().cpu()
        x = (x if str(x.dtype) != "torch.bfloat16" else x.float()).numpy()
    try:
        x = np.asarray(x)
    except ValueError as error:
        raise UserError("Rows must have the same length: tokenize with padding=True.") from error
    if x.dtype.kind in "SU":
        raise UserError(
            f"Expected an array of numbers, got the text {x.ravel()[:1].tolist()!r:.50}. Tokenize sequences first: "
            'inputs = tokenizer(sequences, padding=True, return_tensors="mlx"), then model(**inputs).'
        )
    try:
        if x.dtype.kind in NUMBERS:
            return mx.array(x)
    except (RuntimeError, TypeError, ValueError):  # MLX has no such dtype
        pass
    kind = "" if x.dtype == object else f"{x.dtype} "
    raise UserError(f"Expected an array of numbers, got {kind}{x.tolist()!r:.100}.")


def to_numpy(x: mx.array | None) -> np.ndarray | None:
    """Return the values of `x`, or None while `mx.compile` or `mx.vmap` traces it, when it has none yet."""
    try:
        return None if x is None else np.array(x)
    except ValueError:
        return None


class Tables(NamedTuple):
    """Sizes of a model's tables, which limit its inputs.

    Attributes:
        vocab_size: rows of the embedding table.
        hidden_size: D.
        padding_idx: id of the padding token.
        position_rows: rows of a learned position table, of which the first `padding_idx` + 1 are not used by tokens;
            None if the model has no such table.
    """

    vocab_size: int
    hidden_size: int
    padding_idx: int
    position_rows: int | None = None


class Inputs(NamedTuple):
    """Checked arguments of a forward pass."""

    shape: tuple[int, int]  # (B, L)
    input_ids: mx.array | None  # int32 [B, L]
    inputs_embeds: mx.array | None  # [B, L, D]
    position_ids: mx.array | None  # [B, L] or [1, L]
    attention_mask: mx.array | None  # [B, L]; None without padding
    mask_values: np.ndarray | None  # values of the mask; None without padding or while it is traced


def check_inputs(input_ids: Any, attention_mask: Any, position_ids: Any, inputs_embeds: Any, tables: Tables) -> Inputs:
    """Convert the arguments of a forward pass to arrays and check them.

    Args:
        input_ids: [B, L] token ids.
        attention_mask: [B, L], 1 for tokens, 0 for padding; None without padding.
        position_ids: [B, L], [1, L] or [L].
        inputs_embeds: [B, L, D] instead of `input_ids`.
        tables: sizes of the model's tables.

    Raises:
        ValueError: neither or both of `input_ids` and `inputs_embeds`, an empty batch, wrong shapes, ids outside the
            vocabulary, a row longer than the position table, or a mask with other values than 0 and 1. Values are not
            checked while the call is traced.
        RuntimeError: this process was forked from one that has created a model.
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
            hint = " For a batch of one sequence, pass [input_ids]." if input_ids.ndim == 1 else ""
            raise UserError(f"input_ids must have shape [batch, length], got {input_ids.shape}.{hint}")
        B, L = input_ids.shape
    else:
        assert inputs_embeds is not None
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != hidden_size:
            raise UserError(f"inputs_embeds must have shape [batch, length, {hidden_size}], got {inputs_embeds.shape}.")
        B, L, _ = inputs_embeds.shape
    if B == 0 or L == 0:
        raise UserError(f"The batch must not be empty, got shape {(B, L)}.")
    return B, L


def _check_mask(attention_mask: mx.array | None, shape: tuple[int, int]) -> tuple[mx.array | None, np.ndarray | None]:
    """Return the mask and its values; None for both without padding."""
    if attention_mask is None:
        return None, None
    if attention_mask.shape != shape:
        raise UserError(f"attention_mask must have the shape of the input, {shape}, got {attention_mask.shape}.")
    values = to_numpy(attention_mask)
    if values is None:
        return attention_mask, None
    if not np.isin(values, (0, 1)).all():
        raise UserError("attention_mask must be 1 for tokens and 0 for padding.")
    return (None, None) if values.all() else (attention_mask, values)


def _check_ids(input_ids: mx.array, tables: Tables, counts_positions: bool) -> None:
    if not mx.issubdtype(input_ids.dtype, mx.integer):
        raise UserError(f"input_ids must be integers, got {input_ids.dtype}.")
    ids = to_numpy(input_ids)
    if ids is None:
        return
    outside = (ids < 0) | (ids >= tables.vocab_size)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise UserError(
            f"input_ids[{row}, {column}] is {ids[row, column]}, expected 0 to {tables.vocab_size - 1}, the ids of the "
            "model's vocabulary. Use the checkpoint's tokenizer."
        )
    if tables.position_rows is not None and counts_positions:
        lengths = (ids != tables.padding_idx).sum(axis=1)
        longest = tables.position_rows - tables.padding_idx - 1
        if lengths.max() > longest:
            raise UserError(
                f"Row {lengths.argmax()} has {lengths.max()} tokens, but the model's position table has room for "
                f"{longest}, including special tokens. Truncate or split the sequence, or use a model without a "
                "position table, such as ESM-2."
            )


def _check_positions(
    position_ids: mx.array | None, shape: tuple[int, int], position_rows: int | None
) -> mx.array | None:
    if position_ids is None:
        return None
    if position_ids.ndim == 1:
        position_ids = position_ids[None]
    if position_ids.shape not in (shape, (1, shape[1])):
        raise UserError(f"position_ids must have shape {shape} or {(1, shape[1])}, got {position_ids.shape}.")
    positions = to_numpy(position_ids)
    if position_rows is None or positions is None:
        return position_ids
    if positions.min() < 0 or positions.max() >= position_rows:
        raise UserError(
            f"position_ids must be between 0 and {position_rows - 1}, the rows of the position table, got "
            f"{positions.min()} to {positions.max()}."
        )
    return position_ids


def check_sequence_id(sequence_id: Any, shape: tuple[int, int]) -> mx.array:
    """Return the chain of each token as an array [B, L], −1 at padding.

    Raises:
        ValueError: wrong shape or dtype.
    """
    sequence_id = as_array(sequence_id)
    if sequence_id.shape != shape:
        raise UserError(f"sequence_id must have the shape of the input, {shape}, got {sequence_id.shape}.")
    if not mx.issubdtype(sequence_id.dtype, mx.integer):
        raise UserError(
            f"sequence_id must be integers (the chain of each token, -1 at padding), got {sequence_id.dtype}."
        )
    return sequence_id


# Arguments of transformers' forward passes that have no effect on these networks, and those that must be None.
IGNORED = {"use_cache", "token_type_ids", "cache_position", "num_items_in_batch"}
UNUSED = {"past_key_values", "head_mask", "encoder_hidden_states", "encoder_attention_mask"}


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise TypeError for arguments that a forward pass does not have, except those of transformers without effect."""
    for name, value in arguments.items():
        if name not in IGNORED and not (name in UNUSED and value is None):
            raise TypeError(f"The model has no argument {name!r}.")


def labels_at(labels: Any, places: np.ndarray) -> bool:
    """Return whether any token at `places` (bool [B, L]) has a label. While labels are traced, assume it has."""
    if labels is None:
        return False
    values = to_numpy(as_array(labels))
    return values is None or values.shape != places.shape or bool((values[places] != IGNORE_INDEX).any())


def check_labels(labels: Any, logits: mx.array, ignore_index: int) -> mx.array:
    """Return class labels as an array [...] for logits [..., C].

    Raises:
        ValueError: labels of another shape than the logits, of a wrong dtype, or outside 0 to C − 1.
    """
    labels = as_array(labels)
    if labels.size != logits.size // logits.shape[-1]:
        raise UserError(f"labels must have shape {logits.shape[:-1]} for logits {logits.shape}, got {labels.shape}.")
    if not mx.issubdtype(labels.dtype, mx.integer):
        raise UserError(f"Class labels must be integers, got {labels.dtype}.")
    values = to_numpy(labels)
    if values is not None:
        outside = (values != ignore_index) & ((values < 0) | (values >= logits.shape[-1]))
        if outside.any():
            raise UserError(
                f"Labels must be 0 to {logits.shape[-1] - 1}, or {ignore_index} to exclude a token from the loss, got "
                f"{values[outside][0]}."
            )
    return labels.reshape(logits.shape[:-1]).astype(mx.int32)
