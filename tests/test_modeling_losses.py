"""Losses compared with the functions that transformers' models call. Losses of networks are tested with the models.

The error of a single number depends on luck, so several losses are compared at once, each with its gradient.
"""

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import EsmConfig
from transformers.loss.loss_utils import ForSequenceClassificationLoss, fixed_cross_entropy

from mlx_esm_hf.modeling_losses import classification_loss, cross_entropy
from tests.bar import hold_to_bar

RANDOM = np.random.default_rng(0)
CLASSES = RANDOM.integers(0, 4, (8, 6), dtype=np.int32)
NUMBERS = RANDOM.normal(size=(8, 6, 4)).astype(np.float32)
BITS = (NUMBERS > 0).astype(np.float32)

# {case: (problem type, number of labels, labels of eight batches, whether transformers infers the type)}
PROBLEMS = {
    "classes": ("single_label_classification", 4, CLASSES, True),
    "several labels": ("multi_label_classification", 4, BITS, True),
    "a number": ("regression", 1, NUMBERS[..., 0], True),
    "a number [B, 1]": ("regression", 1, NUMBERS[..., :1], True),
    "a whole number": ("regression", 1, CLASSES, True),
    "numbers": ("regression", 4, NUMBERS, False),
}


def hold(ours, theirs, logits, labels):
    """Hold the losses of batches of logits, and their gradients, to the bar."""

    def in_torch(dtype):
        parameter = torch.tensor(logits, dtype=dtype, requires_grad=True)
        targets = [torch.tensor(of_one) for of_one in labels]
        if targets[0].is_floating_point():
            targets = [of_one.to(dtype) for of_one in targets]
        losses = torch.stack([theirs(*batch) for batch in zip(parameter, targets, strict=True)])
        losses.sum().backward()
        return losses.detach().numpy(), parameter.grad.numpy()

    batches = [(mx.array(x), mx.array(y)) for x, y in zip(logits, labels, strict=True)]
    found = [np.array(x) for x in map(mx.stack, zip(*[mx.value_and_grad(ours)(*b) for b in batches], strict=True))]
    for one, float32, float64 in zip(found, in_torch(torch.float32), in_torch(torch.float64), strict=True):
        hold_to_bar(one, float32, float64)


def logits_of(*shape):
    return RANDOM.normal(scale=3, size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("problem", "chosen"),
    [(name, chosen) for name, (*_, can_be) in PROBLEMS.items() for chosen in ([False, True] if can_be else [False])],
)
def test_problem_types(problem, chosen):
    """Compare problem types set in the config and inferred as in transformers."""
    kind, count, labels, _ = PROBLEMS[problem]
    ours, theirs = (EsmConfig(num_labels=count, problem_type=None if chosen else kind) for _ in range(2))
    hold(
        lambda logits, y: classification_loss(ours, logits, y),
        # torch needs int64 for classes and floats for other labels, and integers have no gradient
        lambda logits, y: ForSequenceClassificationLoss(
            y.to(logits.dtype) if kind != "single_label_classification" else y.long(), logits, theirs
        ),
        logits_of(8, 6, count),
        labels,
    )
    assert ours.problem_type == theirs.problem_type == kind


@pytest.mark.parametrize("ignored", [-100, 3])
def test_ignored_labels(ignored):
    """Some labels are ignored, and all of one row."""
    labels = RANDOM.integers(0, 5, (8, 3, 6), dtype=np.int32)
    labels[:, 0] = labels[:, 1, ::2] = ignored
    hold(
        lambda logits, y: cross_entropy(logits, y, ignored),
        lambda logits, y: fixed_cross_entropy(logits.flatten(0, 1), y.flatten().long(), ignore_index=ignored),
        logits_of(8, 3, 6, 5),
        labels,
    )


@pytest.mark.parametrize(
    ("kind", "shape", "labels", "message"),
    [
        ("single_label_classification", (2, 3), (2, 3), r"must have shape \(2,\) for logits \(2, 3\), got \(2, 3\)"),
        ("multi_label_classification", (2, 3), (2,), r"shape \(2,\), a multi_label_classification loss needs \(2, 3\)"),
        ("regression", (2, 3), (2, 1), r"shape \(2, 1\), a regression loss needs \(2, 3\)"),
        ("regression", (2, 1), (3, 1), r"shape \(3,\), a regression loss needs \(2,\)"),
    ],
)
def test_wrong_shapes(kind, shape, labels, message):
    config = EsmConfig(num_labels=shape[-1], problem_type=kind)
    with pytest.raises(ValueError, match=message):
        classification_loss(config, mx.zeros(shape), mx.zeros(labels, mx.int32))
