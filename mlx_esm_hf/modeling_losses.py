"""Losses that models return if they get labels; identical to transformers'."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX, check_labels


def cross_entropy(logits: mx.array, labels: Any, ignore_index: int = IGNORE_INDEX) -> mx.array:
    """Return the mean cross-entropy of logits [..., C] over the labels [...] that are not `ignore_index`."""
    labels = check_labels(labels, logits, ignore_index)
    kept = labels != ignore_index
    losses = mx.where(kept, nn.losses.cross_entropy(logits, mx.where(kept, labels, 0)), 0)
    # Row by row: MLX adds elements sequentially, which loses precision over a whole batch.
    return losses.sum(axis=-1).sum() / kept.sum()


def classification_loss(config: Any, logits: mx.array, labels: mx.array) -> mx.array:
    """Return the loss of whole sequences for `config.problem_type`.

    Args:
        config: if its `problem_type` is None, it is set as in transformers: "regression" for one label,
            "single_label_classification" for integer labels, otherwise "multi_label_classification".
        logits: [B, num_labels].
        labels: [B] classes, or [B] or [B, num_labels] floating-point values.

    Raises:
        ValueError: labels of the wrong shape.
    """
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif mx.issubdtype(labels.dtype, mx.integer):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"

    if config.problem_type == "single_label_classification":
        return cross_entropy(logits, labels)
    if config.num_labels == 1 and config.problem_type == "regression":
        logits, labels = logits.squeeze(), labels.squeeze()
    if logits.shape != labels.shape:
        raise UserError(f"labels must have shape {logits.shape} for a {config.problem_type} loss, got {labels.shape}.")
    labels = labels.astype(logits.dtype)
    if config.problem_type == "regression":
        return nn.losses.mse_loss(logits, labels)
    return nn.losses.binary_cross_entropy(logits, labels)
