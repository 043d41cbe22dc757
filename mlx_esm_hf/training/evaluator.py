"""Losses, evaluations and predictions of a trainer; the base of `MLXTrainer`."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from transformers import DataCollatorWithPadding, default_data_collator
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.files import replace_file
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.callbacks import Callbacks, Control
from mlx_esm_hf.training.checkpoints import TrainerState
from mlx_esm_hf.training.datasets import batches_by_rows
from mlx_esm_hf.training.evaluation import (
    Batch,
    Batches,
    as_numpy,
    batches_of_rank,
    gather,
    joined,
    loss_of,
    plain_numbers,
    predictions_of,
    smoothed_loss,
)
from mlx_esm_hf.training.loop import label_count, to_mlx
from mlx_esm_hf.training.reporting import tracker_callbacks

LOG = "log.jsonl"


class Evaluator:
    """The part of `MLXTrainer` that makes batches, computes losses, evaluates and logs; see there for the arguments."""

    def __init__(
        self,
        model: nn.Module,
        args: MLXTrainingArguments,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., mx.array] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: Sequence[Any] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    ):
        self.model: Any = model
        self.args = args
        self.eval_dataset = eval_dataset
        for name, data in named_datasets(eval_dataset).items():
            if data is not None and not hasattr(data, "__len__"):
                raise UserError(f"The evaluation data{f' {name!r}' if name else ''} have no length: pass a list.")
        self.processing_class = processing_class
        self.compute_loss_func, self.compute_metrics = compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        if data_collator is None and processing_class is not None:
            data_collator = DataCollatorWithPadding(processing_class, return_tensors="np")
        self.data_collator = data_collator or (lambda items: default_data_collator(items, return_tensors="np"))
        self.folder = Path(args.output_dir)
        self.state, self.control = TrainerState(), Control()
        self.optimizer: Any = None
        self.lr_scheduler: Any = None
        self.label_names = args.label_names or ["labels"]
        self.callbacks = Callbacks([*(callbacks or []), *tracker_callbacks(args)])
        parameters = inspect.signature(type(model).__call__).parameters.values()
        named = {p.name for p in parameters if p.kind != p.VAR_KEYWORD}
        self._columns = {*named, "label", "label_ids", *self.label_names}

    # Batches

    def _collate(self, rows: Sequence[Any]) -> Batch:
        """Return the batch of these rows of a data set."""
        rows = list(rows)
        if self.args.remove_unused_columns and all(isinstance(row, Mapping) for row in rows):
            rows = [{name: x for name, x in row.items() if name in self._columns} for row in rows]
        return self._arrays(self.data_collator(rows))

    def _arrays(self, batch: Mapping[str, Any]) -> Batch:
        """Return a batch as NumPy arrays. Integer labels of a regression become floats, of which −100 is a label."""
        arrays = as_numpy(batch)
        if self._is_regression():
            for name in self.label_names:
                if name in arrays and np.issubdtype(arrays[name].dtype, np.integer):
                    arrays[name] = arrays[name].astype(np.float32)
        return arrays

    def _is_regression(self) -> bool:
        """Return whether the model's own loss is a regression, which the first batch of one label makes it."""
        config = getattr(self.model, "config", None)
        if getattr(config, "problem_type", None) is not None:
            return config.problem_type == "regression"  # type: ignore[union-attr]
        classifies = type(self.model).__name__.endswith("ForSequenceClassification")
        return classifies and getattr(config, "num_labels", None) == 1

    def _reader(self, data: Any) -> Callable[[np.ndarray], Batch]:
        """Return a function from item indices of a data set to their batch."""
        return lambda items: self._collate([data[int(item)] for item in items])

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Iterable[Any]:
        """Return the batches of an evaluation. A subclass may override it."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        groups = batches_by_rows(range(len(data)), self.args.per_device_eval_batch_size)
        return Batches(groups, self._reader(data))

    def get_test_dataloader(self, test_dataset: Any) -> Iterable[Any]:
        """Return the batches of a prediction. A subclass may override it."""
        groups = batches_by_rows(range(len(test_dataset)), self.args.per_device_eval_batch_size)
        return Batches(groups, self._reader(test_dataset))

    def num_examples(self, dataloader: Any) -> int:
        """Return the number of items in a data loader of this trainer, or in the `dataset` of another one."""
        return sum(map(len, dataloader.groups)) if isinstance(dataloader, Batches) else len(dataloader.dataset)

    # Losses

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, mx.array],
        return_outputs: bool = False,
        num_items_in_batch: mx.array | None = None,
    ) -> Any:
        """Return the mean loss over the labels of a batch, in training and in evaluation. A subclass may override it.

        It may lack the last two arguments. It is not compiled on a GPU, so it may read numbers that change.

        Args:
            model: the model.
            inputs: the batch.
            return_outputs: return (loss, outputs).
            num_items_in_batch: number of labels of the batch, an array without axes.

        Raises:
            UserError: the model returns no loss.
        """
        labels: Any = inputs.get(self.label_names[0])
        if self.compute_loss_func is not None or (self.args.label_smoothing_factor and labels is not None):
            outputs = model(**{name: x for name, x in inputs.items() if name != self.label_names[0]})
            if self.compute_loss_func is not None:
                loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
            else:
                loss = smoothed_loss(outputs["logits"], labels, self.args.label_smoothing_factor)
        else:
            outputs = model(**inputs)
            loss = loss_of(outputs)
        if loss is None:
            raise UserError(
                f"The model returned no loss for a batch with {', '.join(inputs)}. It needs labels: name the column "
                "'label' or 'labels'."
            )
        return (loss, outputs) if return_outputs else loss

    def _loss(self, model: Any, inputs: dict[str, mx.array], return_outputs: bool = False) -> Any:
        """Call `compute_loss` with those arguments that it has; it may change `inputs`."""
        has_outputs = self._loss_takes("return_outputs")
        options: dict[str, Any] = {"return_outputs": True} if return_outputs and has_outputs else {}
        if self._loss_takes("num_items_in_batch"):
            labels = inputs.get(self.label_names[0])
            counted = labels is not None and mx.issubdtype(labels.dtype, mx.integer)
            if labels is not None:
                options["num_items_in_batch"] = (labels != IGNORE_INDEX).sum() if counted else mx.array(labels.size)
        found = self.compute_loss(model, dict(inputs), **options)
        if return_outputs and not has_outputs:
            return found, model(**{name: x for name, x in inputs.items() if name in self._columns})
        return found

    def _loss_takes(self, name: str) -> bool:
        """Return whether `compute_loss` has an argument."""
        parameters = inspect.signature(self.compute_loss).parameters
        return name in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return, and log, the mean loss over the labels of a data set and the result of `compute_metrics`.

        Args:
            eval_dataset: the data set, or a dictionary of them; by default the trainer's `eval_dataset`. A string names
                one of the trainer's.
            ignore_keys: outputs of the model that predictions leave out.
            metric_key_prefix: prefix of the names: "eval" gives "eval_loss".
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str):
            metric_key_prefix, data = f"{metric_key_prefix}_{data}", self.eval_dataset[data]
        if data is None and not self._overrides("get_eval_dataloader"):
            raise UserError("There are no evaluation data: give MLXTrainer an eval_dataset.")
        if isinstance(data, Mapping):
            found: dict[str, float] = {}
            for name, one in data.items():
                found |= self.evaluate(one, ignore_keys, f"{metric_key_prefix}_{name}")
            return found
        loss_only = True if self.compute_metrics is None or self.args.prediction_loss_only else None
        output = self.evaluation_loop(
            self.get_eval_dataloader(data), "Evaluation", loss_only, ignore_keys, metric_key_prefix
        )
        metrics: Any = output.metrics
        self.log(metrics)
        self._call("on_evaluate", metrics=metrics)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Return predictions for a data set, in its order and padded with −100, as transformers' `PredictionOutput`."""
        output = self.evaluation_loop(
            self.get_test_dataloader(test_dataset), "Prediction", None, ignore_keys, metric_key_prefix
        )
        self._call("on_predict", metrics=output.metrics)
        return PredictionOutput(output.predictions, output.label_ids, output.metrics)

    def evaluation_loop(
        self,
        dataloader: Iterable[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate batches. A subclass may override it.

        Args:
            dataloader: the batches.
            description: what this evaluation is, for subclasses.
            prediction_loss_only: compute the loss alone; None means no.
            ignore_keys: outputs of the model that predictions leave out.
            metric_key_prefix: prefix of the names of metrics.

        Returns:
            transformers' `EvalLoopOutput`. The loss is the mean over all labels.
        """
        was_training = self.model.training
        self.model.eval()
        began, total, count, samples = time.perf_counter(), 0.0, 0, 0
        rows: list[dict[str, Any]] = []  # of this rank's batches
        for batch in batches_of_rank(dataloader, self._arrays):
            inputs = to_mlx(batch)
            step = self.prediction_step(self.model, inputs, bool(prediction_loss_only), ignore_keys)
            number, size = label_count(batch, self.label_names), len(next(iter(batch.values())))
            samples += size
            if step[0] is not None and number:  # the mean loss over no labels is NaN
                total, count = total + float(step[0]) * number, count + number
            if not prediction_loss_only:
                rows.append(self._kept(inputs, *step, size=size))
            self._call("on_prediction_step")
        self.model.train(was_training)
        total, count = self._sum_over_ranks(total), distributed.all_sum(count)
        found: Any = joined(gather(rows, self.state.global_step)) if not prediction_loss_only else None
        found = found or {}
        metrics = ({"loss": total / count} if count else {}) | self._computed_metrics(found)
        prefix = f"{metric_key_prefix}_"
        metrics = {name if name.startswith(prefix) else f"{prefix}{name}": x for name, x in metrics.items()}
        metrics[f"{prefix}runtime"] = time.perf_counter() - began
        samples = distributed.all_sum(samples)
        return EvalLoopOutput(found.get("predictions"), found.get("labels"), plain_numbers(metrics), samples)

    def _kept(
        self, inputs: dict[str, mx.array], loss: mx.array | None, predictions: Any, labels: Any, size: int
    ) -> dict[str, Any]:
        """Return what metrics and predictions need of a batch of `size` rows, as NumPy arrays."""
        if predictions is not None and self.preprocess_logits_for_metrics is not None:
            predictions = self.preprocess_logits_for_metrics(predictions, labels)
        row = {"predictions": predictions, "labels": labels}
        if "inputs" in self.args.include_for_metrics:
            row["inputs"] = inputs[getattr(self.model, "main_input_name", "input_ids")]
        if "loss" in self.args.include_for_metrics and loss is not None:
            row["losses"] = mx.broadcast_to(loss, (size,))
        return {name: tree_map(_to_numpy, x) for name, x in row.items() if x is not None}

    def _computed_metrics(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Return the result of `compute_metrics` for what `_kept` returned, joined."""
        if self.compute_metrics is None or "labels" not in found:
            return {}
        others = {name: found[name] for name in ("inputs", "losses") if name in found}
        predictions: Any = found.get("predictions")
        return self.compute_metrics(EvalPrediction(predictions, found["labels"], **others))

    def prediction_step(
        self, model: Any, inputs: dict[str, mx.array], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[mx.array | None, Any, Any]:
        """Return the loss, predictions and labels of a batch; each may be None. A subclass may override it.

        Args:
            model: the model.
            inputs: the batch.
            prediction_loss_only: return the loss alone.
            ignore_keys: outputs that the predictions leave out.
        """
        labels: Any = tuple(inputs[name] for name in self.label_names if inputs.get(name) is not None)
        if len(labels) == len(self.label_names) or self._overrides("compute_loss") or self.compute_loss_func:
            loss, outputs = self._loss(model, inputs, return_outputs=True)
        else:
            outputs = model(**inputs)
            loss = loss_of(outputs) if isinstance(outputs, Mapping) else None
        predictions = None if prediction_loss_only else predictions_of(outputs, ignore_keys or [])
        mx.eval(loss, predictions) if loss is not None else mx.eval(predictions)
        return loss, predictions, labels[0] if len(labels) == 1 else labels or None

    @staticmethod
    def _sum_over_ranks(value: float) -> float:
        """Return the sum of the ranks' values, in float32."""
        if distributed.size() == 1:
            return value
        total: Any = distributed.all_sum_array(mx.array(value, dtype=mx.float32))
        return total.item()

    # Callbacks and log

    def add_callback(self, callback: Any) -> None:
        """Add a callback, an object or a class."""
        self.callbacks.add(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, or the first one of a class, and return it; None if there is none."""
        return self.callbacks.pop(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, or the first one of a class."""
        self.callbacks.pop(callback)

    def _call(self, event: str, **values: Any) -> None:
        """Call the callbacks."""
        values |= {"model": self.model, "processing_class": self.processing_class, "optimizer": self.optimizer}
        values |= {"lr_scheduler": self.lr_scheduler, "train_dataloader": None, "eval_dataloader": None}
        self.callbacks.call(event, self.args, self.state, self.control, **values)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add a line to the log. A subclass may override it.

        Args:
            logs: {name: value}. "epoch" is added.
            start_time: ignored; transformers passes it.
        """
        logs["epoch"] = self.state.epoch
        line = plain_numbers(logs) | {"step": self.state.global_step}
        self.state.log_history.append(line)
        if distributed.is_rank_0() and self.folder.is_dir():
            with open(self.folder / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self._call("on_log", logs=logs)

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print metrics, one per line.

        Args:
            split: what they were measured on, such as "eval".
            metrics: {name: value}.
        """
        if not self.is_world_process_zero():
            return
        width = max(map(len, metrics), default=0)
        print(f"***** {split} metrics *****")
        for name, value in sorted(metrics.items()):
            print(f"  {name:<{width}} = {f'{value:.4f}' if isinstance(value, float) else value:>10}")

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """Write `<split>_results.json` and, if `combined`, add the metrics to `all_results.json`."""
        files = [self.folder / f"{split}_results.json"] + ([self.folder / "all_results.json"] if combined else [])

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                is_sum = file.name == "all_results.json" and file.exists()
                earlier = json.loads(file.read_text(encoding="utf-8")) if is_sum else {}
                text = json.dumps(earlier | plain_numbers(metrics), indent=4, sort_keys=True)
                replace_file(file, text.encode())

        distributed.on_rank_0(write)

    def is_world_process_zero(self) -> bool:
        """Return whether this is rank 0."""
        return distributed.is_rank_0()

    def is_local_process_zero(self) -> bool:
        """Return whether this is rank 0."""
        return distributed.is_rank_0()

    def _overrides(self, name: str) -> bool:
        """Return whether a class outside this package defines a method of the trainer."""
        classes = (base for base in type(self).__mro__ if base is not object)
        return any(name in vars(base) for base in classes if base.__module__.partition(".")[0] != "mlx_esm_hf")


def named_datasets(datasets: Any) -> dict[str, Any]:
    """Return a dictionary of data sets, or one of a single data set under the name ""."""
    return dict(datasets) if isinstance(datasets, Mapping) else {"": datasets}


def _to_numpy(x: Any) -> np.ndarray:
    return np.array(x.astype(mx.float32) if x.dtype in (mx.bfloat16, mx.float16) else x)
