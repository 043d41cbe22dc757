"""Metrics of fine-tuned models with scikit-learn's names, in the form of a trainer's `compute_metrics`.

    >>> compute_metrics = compute_metrics_for("single_label_classification", ["accuracy", "mcc", "roc_auc"])
    >>> MLXTrainer(..., compute_metrics=compute_metrics)

scikit-learn and scipy compute the values (`pip install "mlx-esm-hf[train]"`). A metric that is undefined for the labels
raises an error that gives the reason. One that is undefined because of the predictions does not, since an untrained
model may predict anything: precision without a positive prediction is 0, and the correlation with constant predictions
is NaN, as in the libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlx_esm_hf.checks import suggestion
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX

AVERAGED = ("f1", "precision", "recall")
AVERAGES = ("macro", "micro", "weighted")
WITH_AVERAGE = tuple(f"{name}_{average}" for name in AVERAGED for average in AVERAGES)

# {problem_type of a model's config: names of its metrics}
METRICS = {
    "single_label_classification": (
        *("accuracy", "balanced_accuracy", "matthews_corrcoef", "roc_auc", "roc_auc_ovr", "average_precision"),
        *(*AVERAGED, *WITH_AVERAGE),
    ),
    "multi_label_classification": ("accuracy", "roc_auc", "average_precision", *WITH_AVERAGE),
    "regression": (
        *("mean_squared_error", "root_mean_squared_error", "mean_absolute_error", "r2"),
        *("spearman", "pearson"),
    ),
}
ALIASES = {"auroc": "roc_auc", "matthews_correlation": "matthews_corrcoef", "mcc": "matthews_corrcoef"}


def compute_metrics_for(problem_type: str, metrics: Sequence[str]) -> Callable[[Any], dict[str, float]]:
    """Return a function that computes metrics from the predictions for an evaluation set.

    Args:
        problem_type: a value of `config.problem_type`: "single_label_classification" (of sequences or residues),
            "multi_label_classification" or "regression".
        metrics: names from `METRICS` or `ALIASES`. "f1", "precision", "recall", "roc_auc" and "average_precision" need
            two classes and are those of class 1. With more classes use "f1_macro", "roc_auc_ovr" and so on.

    Returns:
        A function from an object such as transformers' `EvalPrediction` to {metric: value}. Its `predictions` are the
        model's logits, or a tuple that starts with them: [..., classes] for a single label, else the shape of
        `label_ids`. A label of −100 is ignored. It raises a ValueError if predictions or labels contain NaN, or if a
        metric is undefined for the labels.

    Raises:
        ValueError: the problem type or a metric is unknown.
        ImportError: scikit-learn or scipy is not installed.
    """
    if problem_type not in METRICS:
        raise UserError(f"problem_type must be one of {', '.join(METRICS)}, got {problem_type!r}.")
    for name in metrics:
        if ALIASES.get(name, name) not in METRICS[problem_type]:
            known = METRICS[problem_type]
            raise UserError(
                f"Metric {name!r} not found for {problem_type}. It must be one of {', '.join(known)}."
                f"{suggestion(name, known)}"
            )
    try:
        import scipy.stats  # noqa: F401
        import sklearn.metrics  # noqa: F401
    except ImportError as error:
        raise ImportError('Metrics need scikit-learn and scipy: pip install "mlx-esm-hf[train]"') from error

    def compute_metrics(evaluated: Any) -> dict[str, float]:
        predictions, labels = evaluated.predictions, np.asarray(evaluated.label_ids)
        if isinstance(predictions, tuple):
            predictions = predictions[0]
        predictions = np.asarray(predictions, dtype=np.float64)
        if problem_type == "single_label_classification":
            predictions, labels = _labelled_only(predictions, labels)
        elif predictions.size == labels.size:
            labels = labels.reshape(predictions.shape)
        else:
            raise UserError(f"Expected predictions of the labels' shape {labels.shape}, got {predictions.shape}.")
        _check_values(predictions, labels)
        metric = {
            "single_label_classification": _single_label_metric,
            "multi_label_classification": _multi_label_metric,
            "regression": _regression_metric,
        }[problem_type]
        return {name: float(metric(ALIASES.get(name, name), predictions, labels)) for name in metrics}

    return compute_metrics


def _labelled_only(predictions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits [n, classes] and labels [n] of the items that have a label."""
    if predictions.ndim != labels.ndim + 1 or predictions.shape[:-1] != labels.shape or predictions.shape[-1] < 2:
        raise UserError(
            "Expected logits of shape (*labels.shape, classes) with two or more classes, got shape "
            f"{predictions.shape} for labels of shape {labels.shape}."
        )
    labelled = labels != IGNORE_INDEX
    predictions, labels = predictions[labelled], labels[labelled]
    classes = predictions.shape[-1]
    if outside := sorted(set(labels[(labels < 0) | (labels >= classes)].tolist())):
        raise UserError(
            f"Labels must be from 0 to {classes - 1}, as the model predicts {classes} classes; got {outside[0]}."
        )
    return predictions, labels


def _check_values(predictions: np.ndarray, labels: np.ndarray) -> None:
    if not labels.size:
        raise UserError("The evaluation set has no labels: there is nothing to measure.")
    if not np.isfinite(labels).all():
        raise UserError(f"{np.sum(~np.isfinite(labels))} labels of the evaluation set are NaN or infinite.")
    if wrong := np.sum(~np.isfinite(predictions)):
        raise UserError(f"{wrong} of {predictions.size} predictions are NaN or infinite: training has diverged.")


def _single_label_metric(name: str, logits: np.ndarray, labels: np.ndarray) -> float:
    """Compute a metric from logits [n, classes] and labels [n]."""
    from sklearn import metrics

    classes = logits.shape[-1]
    predicted = logits.argmax(axis=-1)
    if name == "accuracy":
        return metrics.accuracy_score(labels, predicted)
    if name == "balanced_accuracy":
        return metrics.balanced_accuracy_score(labels, predicted)
    if name == "matthews_corrcoef":
        return metrics.matthews_corrcoef(labels, predicted)
    if name in WITH_AVERAGE:
        return _averaged_metric(name, labels, predicted)
    if name == "roc_auc_ovr" and classes > 2:
        return _one_versus_rest(logits, labels)
    if classes > 2:
        others = [other for other in METRICS["single_label_classification"] if other.startswith(f"{name}_")]
        advice = f"use {', '.join(others)}" if others else "leave it out"
        raise UserError(f"{name} is for two classes, but the model predicts {classes}: {advice}.")
    if name in AVERAGED:
        return _averaged_metric(f"{name}_binary", labels, predicted)
    return _ranking_metric(name.removesuffix("_ovr"), labels, logits[:, 1] - logits[:, 0])


def _one_versus_rest(logits: np.ndarray, labels: np.ndarray) -> float:
    """Compute the mean AUROC of each class against the others, from logits [n, classes] and labels [n]."""
    from sklearn import metrics

    if absent := sorted(set(range(logits.shape[-1])) - set(labels.tolist())):
        raise UserError(
            f"roc_auc_ovr is undefined: none of the {len(labels)} labels is class {absent[0]}. Evaluate on data with "
            "all classes, or leave it out."
        )
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return metrics.roc_auc_score(labels, odds / odds.sum(axis=-1, keepdims=True), multi_class="ovr")


def _multi_label_metric(name: str, logits: np.ndarray, labels: np.ndarray) -> float:
    """Compute a metric from logits and labels (0 or 1), each [n, labels]."""
    from sklearn import metrics

    labels, predicted = labels.astype(int), (logits > 0).astype(int)
    if name == "accuracy":
        return metrics.accuracy_score(labels, predicted)
    if name in WITH_AVERAGE:
        return _averaged_metric(name, labels, predicted)
    columns = zip(labels.T, logits.T, strict=True)
    return float(np.mean([_ranking_metric(name, *column, f" for label {i}") for i, column in enumerate(columns)]))


def _averaged_metric(name: str, labels: np.ndarray, predicted: np.ndarray) -> float:
    """Compute F1, precision or recall; the name ends with the kind of average. A division by zero gives 0."""
    from sklearn import metrics

    kind, _, average = name.rpartition("_")
    score = {"f1": metrics.f1_score, "precision": metrics.precision_score, "recall": metrics.recall_score}[kind]
    return score(labels, predicted, average=average, zero_division=0)


def _ranking_metric(name: str, labels: np.ndarray, scores: np.ndarray, where: str = "") -> float:
    """Compute a metric of how scores [n] rank labels (0 or 1) [n]."""
    from sklearn import metrics

    if len(present := np.unique(labels)) < 2:
        raise UserError(
            f"{name} is undefined{where}: all {len(labels)} labels are {present[0]}. Evaluate on data with both "
            "classes, or leave it out."
        )
    score = metrics.roc_auc_score if name == "roc_auc" else metrics.average_precision_score
    return score(labels, scores)


def _regression_metric(name: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """Compute a metric from predicted and true numbers, [n] or [n, outputs]; the mean over the outputs."""
    from scipy import stats
    from sklearn import metrics

    predictions, labels = predictions.reshape(len(labels), -1), labels.reshape(len(labels), -1)
    if name == "mean_squared_error":
        return metrics.mean_squared_error(labels, predictions)
    if name == "root_mean_squared_error":
        return metrics.root_mean_squared_error(labels, predictions)
    if name == "mean_absolute_error":
        return metrics.mean_absolute_error(labels, predictions)
    if (constant := np.ptp(labels, axis=0) == 0).any():
        raise UserError(
            f"{name} is undefined: all {len(labels)} labels are {labels[0][constant][0]}. Evaluate on data with "
            "different labels, or leave it out."
        )
    if name == "r2":
        return metrics.r2_score(labels, predictions)
    correlation = stats.spearmanr if name == "spearman" else stats.pearsonr
    columns = zip(labels.T, predictions.T, strict=True)
    return float(np.mean([correlation(*column).statistic for column in columns]))
