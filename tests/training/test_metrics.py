"""Metrics compared with values computed by hand."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import transformers

from mlx_esm_hf.training.metrics import METRICS, compute_metrics_for

SINGLE, MULTI, REGRESSION = METRICS


def measure(problem_type, predictions, labels, *names):
    evaluated = SimpleNamespace(predictions=np.array(predictions, np.float32), label_ids=np.array(labels))
    found = compute_metrics_for(problem_type, names)(evaluated)
    assert list(found) == list(names) and all(type(value) is float for value in found.values())
    return tuple(found.values())


def logits(*positive):
    """Return logits of two classes. The arguments are the differences, class 1 minus class 0."""
    return [[1.0, 1.0 + x] for x in positive]


# Predicted 1 1 0 1 0 0: 2 true and 1 false positive, 2 true and 1 false negative.
TWO = logits(2, 0.5, -1, 1, -3, -2), [1, 1, 1, 0, 0, 0]
# Predicted 0 1 2 2 1
THREE = [[3, 1, 0], [0, 2, 1], [0, 1, 2], [1, 0, 4], [0, 2, 0]], [0, 1, 2, 0, 1]


def test_two_classes():
    names = ("accuracy", "balanced_accuracy", "precision", "recall", "f1", "matthews_corrcoef")
    # (2·2 − 1·1) / √(3·3·3·3) = 1/3
    assert measure(SINGLE, *TWO, *names) == pytest.approx((2 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3, 1 / 3))
    # Two of the nine pairs of a positive (2, 0.5, −1) and a negative (1, −3, −2) are in the wrong order.
    assert measure(SINGLE, *TWO, "roc_auc", "roc_auc_ovr") == pytest.approx((7 / 9, 7 / 9))
    # Positives have ranks 1, 3 and 4.
    assert measure(SINGLE, *TWO, "average_precision") == pytest.approx(((1 + 2 / 3 + 3 / 4) / 3,))


def test_aliases():
    assert measure(SINGLE, *TWO, "mcc", "matthews_correlation", "auroc") == pytest.approx((1 / 3, 1 / 3, 7 / 9))


def test_logits_that_a_softmax_would_saturate():
    assert measure(SINGLE, logits(900, 800, -800, -900), [1, 0, 1, 0], "roc_auc") == (0.75,)


def test_three_classes():
    # Class 0: precision 1, recall 1/2; class 1: 1 and 1; class 2: 1/2 and 1.
    names = ("accuracy", "precision_macro", "recall_macro", "f1_macro", "f1_micro", "precision_weighted")
    f1 = (2 / 3 + 1 + 2 / 3) / 3
    assert measure(SINGLE, *THREE, *names) == pytest.approx((0.8, 5 / 6, 5 / 6, f1, 0.8, (2 + 2 + 0.5) / 5))
    # Class 0 has probabilities .84 and .05 for its items, .09, .09, .11 for others: 3 of 6 pairs in order.
    # Class 1: .67 and .79, others .11, .24, .02: all pairs. Class 2: .67, others .04, .24, .94, .11: 3 of 4.
    assert measure(SINGLE, *THREE, "roc_auc_ovr") == pytest.approx(((1 / 2 + 1 + 3 / 4) / 3,))


def test_residues():
    """Items without a label (−100) are ignored, whatever their predictions."""
    predictions, labels = np.full((2, 5, 3), np.nan), np.full((2, 5), -100)
    predictions[0, 1:4], labels[0, 1:4] = THREE[0][:3], THREE[1][:3]
    predictions[1, 1:3], labels[1, 1:3] = THREE[0][3:], THREE[1][3:]
    assert measure(SINGLE, predictions, labels, "accuracy", "precision_macro") == pytest.approx((0.8, 5 / 6))


def test_several_labels():
    predictions, labels = [[1, -1], [2, 1], [-1, 2], [3, -2]], [[1, 0], [0, 1], [0, 0], [1, 0]]
    # Label 0: 2 true and 1 false positives; label 1: 1 and 1.
    names = ("accuracy", "precision_macro", "recall_macro", "f1_micro")
    assert measure(MULTI, predictions, labels, *names) == pytest.approx((0.5, (2 / 3 + 1 / 2) / 2, 1, 6 / 8))
    # Label 0: the positive 1 is below the negative 2: 3 of 4 pairs in order; label 1: 1 is below 2: 2 of 3.
    assert measure(MULTI, predictions, labels, "roc_auc") == pytest.approx(((3 / 4 + 2 / 3) / 2,))


def test_regression():
    predictions, labels = [1.0, 2.0, 4.0, 3.0], [1.0, 3.0, 3.5, 4.5]
    # Errors are 0, −1, 0.5, −1.5; labels minus their mean of 3 are −2, 0, 0.5, 1.5.
    names = ("mean_squared_error", "root_mean_squared_error", "mean_absolute_error", "r2")
    expected = 3.5 / 4, math.sqrt(3.5 / 4), 3 / 4, 1 - 3.5 / 6.5
    assert measure(REGRESSION, predictions, labels, *names) == pytest.approx(expected)
    # Ranks are 1 2 4 3 and 1 2 3 4: 1 − 6 · 2 / (4 · 15). Products of the deviations: 3 + 0 + 0.75 + 0.75 = 4.5.
    expected = 0.8, 4.5 / math.sqrt(5 * 6.5)
    assert measure(REGRESSION, predictions, labels, "spearman", "pearson") == pytest.approx(expected)
    column = np.array(predictions)[:, None]  # the output of a model with one label
    assert measure(REGRESSION, column, labels, "spearman") == pytest.approx((0.8,))
    both = np.stack([predictions, labels], axis=1), np.stack([labels, labels], axis=1)
    assert measure(REGRESSION, *both, "spearman", "mean_squared_error") == pytest.approx((0.9, 3.5 / 8))


def test_predictions_of_transformers():
    evaluated = transformers.EvalPrediction(predictions=(np.array(TWO[0]), "hidden states"), label_ids=np.array(TWO[1]))
    assert compute_metrics_for(SINGLE, ["accuracy"])(evaluated) == {"accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize("problem_type", METRICS)
def test_every_metric(problem_type):
    predictions, labels = {SINGLE: TWO, MULTI: (np.eye(4) - 0.5, np.eye(4)), REGRESSION: ([1, 2, 4], [1, 3, 3])}[
        problem_type
    ]
    assert np.isfinite(measure(problem_type, predictions, labels, *METRICS[problem_type])).all()


# Undefined metrics


def test_nothing_predicted_positive():
    assert measure(SINGLE, logits(-1, -2), [0, 1], "precision", "f1", "matthews_corrcoef") == (0, 0, 0)


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_constant_predictions():
    (correlation,) = measure(REGRESSION, [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], "spearman")
    assert math.isnan(correlation)


@pytest.mark.parametrize(
    ("problem_type", "predictions", "labels", "name", "message"),
    [
        (
            SINGLE,
            logits(1, 2),
            [1, 1],
            "auroc",
            "roc_auc is undefined: all 2 labels are 1. Evaluate on data with both",
        ),
        (SINGLE, logits(1, 2), [0, 0], "average_precision", "average_precision is undefined: all 2 labels are 0"),
        (SINGLE, THREE[0][:2], [0, 1], "roc_auc_ovr", "none of the 2 labels is class 2"),
        (
            SINGLE,
            *THREE,
            "f1",
            "f1 is for two classes, but the model predicts 3: use f1_macro, f1_micro, f1_weighted",
        ),
        (SINGLE, *THREE, "roc_auc", "the model predicts 3: use roc_auc_ovr"),
        (SINGLE, *THREE, "average_precision", "the model predicts 3: leave it out"),
        (SINGLE, logits(1, 2), [0, 2], "accuracy", "Labels must be from 0 to 1, .* got 2"),
        (SINGLE, logits(1, 2), [-1, 0], "accuracy", "Labels must be from 0 to 1, .* got -1"),
        (SINGLE, logits(1, 2), [-100, -100], "accuracy", "The evaluation set has no labels"),
        (
            SINGLE,
            logits(1, np.nan),
            [0, 1],
            "accuracy",
            "1 of 4 predictions are NaN or infinite: training has diverged",
        ),
        (
            SINGLE,
            [[1], [2]],
            [0, 1],
            "accuracy",
            r"two or more classes, got shape \(2, 1\)",
        ),
        (SINGLE, logits(1, 2), [0, 1, 1], "accuracy", r"labels of shape \(3,\)"),
        (MULTI, [[1, 2], [3, 4]], [[0, 1], [1, 1]], "roc_auc", "undefined for label 1: all 2 labels are 1"),
        (REGRESSION, [1, 2], [3, 3], "spearman", "spearman is undefined: all 2 labels are 3"),
        (REGRESSION, [1], [3], "r2", "r2 is undefined: all 1 labels are 3"),
        (REGRESSION, [1, 2], [np.nan, 3], "spearman", "1 labels of the evaluation set are NaN or infinite"),
        (REGRESSION, [np.inf, 2], [4, 3], "r2", "1 of 2 predictions are NaN or infinite"),
        (REGRESSION, [1, 2, 3], [4, 3], "r2", r"labels' shape \(2,\), got \(3,\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_of_evaluation(problem_type, predictions, labels, name, message):
    with pytest.raises(ValueError, match=message):
        measure(problem_type, predictions, labels, name)


@pytest.mark.parametrize(
    ("problem_type", "name", "message"),
    [
        (
            "classification",
            "accuracy",
            "must be one of single_label_classification, .* got 'classification'",
        ),
        (
            SINGLE,
            "spearman",
            "'spearman' not found for single_label_classification. It must be one of accuracy, bal",
        ),
        (REGRESSION, "accuracy", "'accuracy' not found for regression. It must be one of mean_squared_error"),
    ],
)
def test_unknown_names_are_refused(problem_type, name, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics_for(problem_type, [name])


@pytest.mark.parametrize("module", ["sklearn.metrics", "scipy.stats"])
def test_without_the_libraries(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "mlx-esm-hf\[train\]"'):
        compute_metrics_for(SINGLE, ["accuracy"])
