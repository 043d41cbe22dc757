"""The losses that models return when they are given labels, as transformers has them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX, check_labels


def cross_entropy(logits: mx.array, labels: Any, ignore_index: int = IGNORE_INDEX) -> mx.array:
    """Mean cross-entropy of logits [..., C] over the labels [...] that are not `ignore_index`."""
    labels = check_labels(labels, logits, ignore_index)
    kept = labels != ignore_index
    losses = mx.where(kept, nn.losses.cross_entropy(logits, mx.where(kept, labels, 0)), 0)
    return losses.sum(axis=-1).sum() / kept.sum()  # by rows: MLX adds one by one, which over a batch loses digits


def classification_loss(config: Any, logits: mx.array, labels: mx.array) -> mx.array:
    """The loss of logits [B, num_labels] of whole sequences, as `config.problem_type` says.

    Args:
        config: where its `problem_type` is None it is set as in transformers: one label is "regression", whole numbers
            are "single_label_classification", others "multi_label_classification".
        labels: [B] classes, [B] or [B, num_labels] numbers.

    Raises:
        ValueError: labels of another shape than the loss needs.
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
        raise UserError(f"labels have the shape {labels.shape}, a {config.problem_type} loss needs {logits.shape}.")
    labels = labels.astype(logits.dtype)
    if config.problem_type == "regression":
        return nn.losses.mse_loss(logits, labels)
    return nn.losses.binary_cross_entropy(logits, labels)
