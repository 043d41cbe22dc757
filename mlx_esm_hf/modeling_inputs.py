"""What is given to a model: made into `mx.array`, and checked while its values are at hand.

MLX gathers do not check their indices: a token id or a position outside its table silently reads other memory.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_esm_hf.models.esm.configuration_esm import MLXEsmConfig

IGNORED = -100  # the label of a token that is left out of the loss


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
        raise ValueError("The rows have different lengths: tokenize with padding=True.") from error
    return mx.array(x)


def host(x: mx.array | None) -> np.ndarray | None:
    """The values of `x`, or None while it is being traced by `mx.compile` or `mx.vmap`, where it has none yet."""
    try:
        return None if x is None else np.array(x)
    except ValueError:
        return None


def check_inputs(
    config: MLXEsmConfig, input_ids: Any, attention_mask: Any, position_ids: Any, inputs_embeds: Any
) -> tuple[mx.array | None, mx.array | None, mx.array | None, mx.array | None]:
    """The four arguments of a forward pass as arrays, a mask without padding as None.

    Raises:
        ValueError: see `MLXEsmModel.__call__`.
    """
    input_ids, inputs_embeds = as_array(input_ids), as_array(inputs_embeds)
    attention_mask, position_ids = as_array(attention_mask), as_array(position_ids)

    if input_ids is not None:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [batch, length], not of shape {input_ids.shape}.")
        shape = input_ids.shape
    else:
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != config.hidden_size:
            raise ValueError(
                f"inputs_embeds must be [batch, length, {config.hidden_size}], not of shape {inputs_embeds.shape}."
            )
        shape = inputs_embeds.shape[:2]
    if 0 in shape:
        raise ValueError(f"The batch is empty: its shape is {shape}.")

    if attention_mask is not None:
        if attention_mask.shape != shape:
            raise ValueError(f"attention_mask has the shape {attention_mask.shape}, the input {shape}.")
        values = host(attention_mask)
        if values is not None:
            if not np.isin(values, (0, 1)).all():
                raise ValueError("attention_mask must hold 1 for tokens and 0 for padding, and nothing else.")
            if values.all():
                attention_mask = None

    if input_ids is not None:
        if not mx.issubdtype(input_ids.dtype, mx.integer):
            raise ValueError(f"input_ids must be whole numbers, not {input_ids.dtype}.")
        ids = host(input_ids)
        if ids is not None:
            outside = (ids < 0) | (ids >= config.vocab_size)
            if outside.any():
                row, column = np.argwhere(outside)[0]
                raise ValueError(
                    f"input_ids[{row}, {column}] is {ids[row, column]}: not a token of the vocabulary, which has "
                    f"{config.vocab_size}. Use the tokenizer that belongs to the checkpoint."
                )
            if config.position_embedding_type == "absolute" and position_ids is None:
                lengths = (ids != config.pad_token_id).sum(axis=1)
                longest = config.max_position_embeddings - config.pad_token_id - 1
                if lengths.max() > longest:
                    raise ValueError(
                        f"Row {lengths.argmax()} has {lengths.max()} tokens, the position table of this model ends "
                        f"at {longest} ({longest - 2} residues, <cls> and <eos>). Truncate or split the sequence, or "
                        "use ESM-2, which has no such limit."
                    )
        input_ids = input_ids.astype(mx.int32)

    if position_ids is not None:
        if position_ids.ndim == 1:
            position_ids = position_ids[None]
        if position_ids.shape not in (shape, (1, shape[1])):
            raise ValueError(f"position_ids have the shape {position_ids.shape}, the input {shape}.")
        positions = host(position_ids)
        rows = config.max_position_embeddings
        if (
            config.position_embedding_type == "absolute"
            and positions is not None
            and (positions.min() < 0 or positions.max() >= rows)
        ):
            raise ValueError(
                f"position_ids reach from {positions.min()} to {positions.max()}; the position table has the rows 0 to "
                f"{rows - 1}."
            )
    return input_ids, attention_mask, position_ids, inputs_embeds


def labels_at(labels: Any, places: np.ndarray) -> bool:
    """Whether tokens at `places` (bool [B, L]) have a label, or may have one: while labels are traced, nobody knows."""
    if labels is None:
        return False
    values = host(as_array(labels))
    return values is None or values.shape != places.shape or bool((values[places] != IGNORED).any())


def check_labels(labels: Any, logits: mx.array, ignore_index: int) -> mx.array:
    """Labels of classes as an array.

    Raises:
        ValueError: labels that do not fit the logits, or a class that there is none of.
    """
    labels = as_array(labels)
    if labels.size != logits.size // logits.shape[-1]:
        raise ValueError(f"labels have the shape {labels.shape}, the logits {logits.shape}: one label a row is needed.")
    if not mx.issubdtype(labels.dtype, mx.integer):
        raise ValueError(f"labels of classes must be whole numbers, not {labels.dtype}.")
    values = host(labels)
    if values is not None:
        outside = (values != ignore_index) & ((values < 0) | (values >= logits.shape[-1]))
        if outside.any():
            raise ValueError(
                f"The label {values[outside][0]} is not one of the {logits.shape[-1]} classes (0 to "
                f"{logits.shape[-1] - 1}) nor {ignore_index}, which is left out of the loss."
            )
    return labels.reshape(logits.shape[:-1]).astype(mx.int32)
