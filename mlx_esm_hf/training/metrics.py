"""Metrics of fine-tuned models, by scikit-learn's names, in the form that trainers take as `compute_metrics`.

    >>> compute_metrics = compute_metrics_for("single_label_classification", ["accuracy", "mcc", "roc_auc"])
    >>> MLXTrainer(..., compute_metrics=compute_metrics)

The numbers are scikit-learn's and scipy's (`pip install "mlx-esm-hf[train]"`). What is undefined is an error that says
why, except where it is the model that has nothing to say yet: no division by zero (precision without a positive
prediction is 0), and the correlation with constant predictions is NaN, as in the libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX

AVERAGED = ("f1", "precision", "recall")
AVERAGES = ("macro", "micro", "weighted")
WITH_AVERAGE = tuple(f"{name}_{average}" for name in AVERAGED for average in AVERAGES)

# {problem_type, as in the config of a model: names of its metrics}
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
    """A function from what a model has predicted for an evaluation set to {metric: value}.

    Args:
        problem_type: "single_label_classification", of sequences or of residues; "multi_label_classification" or
            "regression"; the words of `config.problem_type`.
        metrics: names from `METRICS`, or "mcc", "matthews_correlation" and "auroc". "f1", "precision", "recall",
            "roc_auc" and "average_precision" of a single label are those of class 1 of two; of more classes name
            "f1_macro", "roc_auc_ovr" and so on.

    Returns:
        A function of an object such as transformers' `EvalPrediction`: `predictions` are the model's logits, or a tuple
        that begins with them. A single label: [..., classes] for `label_ids` [...], where −100 is left out. Several
        labels or regression: the shape of `label_ids`. It raises a ValueError where predictions or
        labels hold NaN, or a metric is not defined for the labels.

    Raises:
        ValueError: an unknown problem type or metric.
        ImportError: scikit-learn or scipy is not installed.
    """
    if problem_type not in METRICS:
        raise UserError(f"problem_type={problem_type!r} is none of {', '.join(METRICS)}.")
    for name in metrics:
        if ALIASES.get(name, name) not in METRICS[problem_type]:
            known = ", ".join(METRICS[problem_type])
            raise UserError(f"There is no metric {name!r} for {problem_type}, but {known}.")
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
            predictions, labels = _with_label(predictions, labels)
        elif predictions.size == labels.size:
            labels = labels.reshape(predictions.shape)
        else:
            raise UserError(f"Predictions of shape {predictions.shape} do not fit labels of shape {labels.shape}.")
        _check_values(predictions, labels)
        of = {
            "single_label_classification": _of_single_label,
            "multi_label_classification": _of_labels,
            "regression": _of_regression,
        }[problem_type]
        return {name: float(of(ALIASES.get(name, name), predictions, labels)) for name in metrics}

    return compute_metrics


def _with_label(predictions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The logits [n, classes] of what has a label, and its labels [n]."""
    if predictions.ndim != labels.ndim + 1 or predictions.shape[:-1] != labels.shape or predictions.shape[-1] < 2:
        raise UserError(
            f"Predictions of shape {predictions.shape} are not the logits of two or more classes for labels of shape "
            f"{labels.shape}."
        )
    labelled = labels != IGNORE_INDEX
    predictions, labels = predictions[labelled], labels[labelled]
    classes = predictions.shape[-1]
    if outside := sorted(set(labels[(labels < 0) | (labels >= classes)].tolist())):
        raise UserError(f"The label {outside[0]} is outside of the {classes} classes that are predicted.")
    return predictions, labels


def _check_values(predictions: np.ndarray, labels: np.ndarray) -> None:
    if not labels.size:
        raise UserError("No item of the evaluation set has a label: there is nothing to measure.")
    if not np.isfinite(labels).all():
        raise UserError(f"{np.sum(~np.isfinite(labels))} labels of the evaluation set are NaN or infinite.")
    if wrong := np.sum(~np.isfinite(predictions)):
        raise UserError(f"{wrong} of {predictions.size} predictions are NaN or infinite: training has diverged.")


def _of_single_label(name: str, logits: np.ndarray, labels: np.ndarray) -> float:
    """A metric of logits [n, classes] and labels [n]."""
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
        return _averaged(name, labels, predicted)
    if name == "roc_auc_ovr" and classes > 2:
        return _one_versus_rest(logits, labels)
    if classes > 2:
        others = [other for other in METRICS["single_label_classification"] if other.startswith(f"{name}_")]
        advice = f"name {', '.join(others)}" if others else "leave it out"
        raise UserError(f"{name} is of two classes, and the predictions are of {classes}: {advice}.")
    if name in AVERAGED:
        return _averaged(f"{name}_binary", labels, predicted)
    return _ranked(name.removesuffix("_ovr"), labels, logits[:, 1] - logits[:, 0])


def _one_versus_rest(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean over the classes of how well each is told from the others, from logits [n, classes] and labels [n]."""
    from sklearn import metrics

    if absent := sorted(set(range(logits.shape[-1])) - set(labels.tolist())):
        raise UserError(
            f"roc_auc_ovr is not defined: none of the {len(labels)} labels is class {absent[0]}. Evaluate on data with "
            "all classes, or leave it out."
        )
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return metrics.roc_auc_score(labels, odds / odds.sum(axis=-1, keepdims=True), multi_class="ovr")


def _of_labels(name: str, logits: np.ndarray, labels: np.ndarray) -> float:
    """A metric of logits and labels, 0 or 1, [n, labels]."""
    from sklearn import metrics

    labels, predicted = labels.astype(int), (logits > 0).astype(int)
    if name == "accuracy":
        return metrics.accuracy_score(labels, predicted)
    if name in WITH_AVERAGE:
        return _averaged(name, labels, predicted)
    columns = zip(labels.T, logits.T, strict=True)
    return float(np.mean([_ranked(name, *column, f" for label {i}") for i, column in enumerate(columns)]))


def _averaged(name: str, labels: np.ndarray, predicted: np.ndarray) -> float:
    """F1, precision or recall, with the average at the end of the name; what is divided by zero is 0."""
    from sklearn import metrics

    kind, _, average = name.rpartition("_")
    score = {"f1": metrics.f1_score, "precision": metrics.precision_score, "recall": metrics.recall_score}[kind]
    return score(labels, predicted, average=average, zero_division=0)


def _ranked(name: str, labels: np.ndarray, scores: np.ndarray, where: str = "") -> float:
    """A metric of how labels, 0 or 1, [n] are ranked by scores [n]."""
    from sklearn import metrics

    if len(present := np.unique(labels)) < 2:
        raise UserError(
            f"{name} is not defined{where}: all {len(labels)} labels are {present[0]}. Evaluate on data with both "
            "classes, or leave it out."
        )
    score = metrics.roc_auc_score if name == "roc_auc" else metrics.average_precision_score
    return score(labels, scores)


def _of_regression(name: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """A metric of predicted and true numbers, [n] or [n, outputs]; the mean over the outputs."""
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
            f"{name} is not defined: all {len(labels)} labels are {labels[0][constant][0]}. Evaluate on data in which "
            "they differ, or leave it out."
        )
    if name == "r2":
        return metrics.r2_score(labels, predictions)
    correlation = stats.spearmanr if name == "spearman" else stats.pearsonr
    columns = zip(labels.T, predictions.T, strict=True)
    return float(np.mean([correlation(*column).statistic for column in columns]))
