"""`MLXTrainer`, which trains any model of this library; mirrors transformers' `Trainer`."""

from __future__ import annotations

import inspect
import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from transformers import DataCollatorWithPadding, default_data_collator
from transformers.trainer_utils import EvalPrediction, PredictionOutput, TrainOutput

from mlx_esm_hf.checkpoint.write import stale_weights
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel, module_at
from mlx_esm_hf.quantization.layers import layers, spec_of
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.device import device_name
from mlx_esm_hf.runtime.files import replace_file, replace_files
from mlx_esm_hf.training.adapters import has_adapters, save_adapter
from mlx_esm_hf.training.adapters.model import adapted_layers
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.checkpoints import (
    TrainerState,
    check_checkpoint,
    checkpoints_in,
    read_arrays,
    remove_parts,
    rotate,
    write_checkpoint,
)
from mlx_esm_hf.training.datasets import batches_by_rows
from mlx_esm_hf.training.loop import Batch, StepResult, TrainingLoop, label_count, to_mlx
from mlx_esm_hf.training.optimizer import AdamW
from mlx_esm_hf.training.progress import TrainingBar
from mlx_esm_hf.training.settings import checksum_of_arrays, checksum_of_items, config_settings, content

LOG = "log.jsonl"

# Names, in messages, of fields of `LoraConfig`: those of the options of `mlx-esm finetune`.
ADAPTER_OPTIONS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}


class MLXTrainer:
    """Trains and evaluates a model, and writes checkpoints from which a training resumes to identical results.

    Args:
        model: a model with a head, which returns a loss when the batch has labels.
        args: the settings.
        data_collator: makes a batch of NumPy arrays from a list of items: one of transformers' with
            `return_tensors="np"`, or a function. By default the tokenizer, if given, pads the items.
        train_dataset, eval_dataset: anything with a length whose items are dictionaries, such as a data set of
            `datasets`. Columns that the model does not accept are dropped.
        processing_class: the tokenizer, saved next to the model.
        compute_metrics: a function from transformers' `EvalPrediction` (predictions, label_ids) to {name: number}.

    Attributes:
        settings: JSON values that determine the result besides what the trainer knows, by name. Checkpoints store them,
            and resuming with others is refused.
        state: the progress of the training.
        optimizer: the optimizer of the last call of `train`.

    Under `mlx.launch` the ranks share each step: the step's batch consists of the batches of all ranks.

    Example:
        >>> trainer = MLXTrainer(model, MLXTrainingArguments("out"), train_dataset=data, processing_class=tokenizer)
        >>> trainer.train()
    """

    def __init__(
        self,
        model: MLXPreTrainedModel,
        args: MLXTrainingArguments | None = None,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    ):
        self.model = model
        self.args = args or MLXTrainingArguments()
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.processing_class = processing_class
        self.compute_metrics = compute_metrics
        if data_collator is None and processing_class is not None:
            data_collator = DataCollatorWithPadding(processing_class, return_tensors="np")
        self.data_collator = data_collator or (lambda items: default_data_collator(items, return_tensors="np"))
        self.settings: dict[str, Any] = {}
        self.state = TrainerState()
        self.optimizer: AdamW | None = None
        self.folder = Path(self.args.output_dir)
        self._columns = {*inspect.signature(type(model).__call__).parameters, "label", "label_ids"}

    # Training

    def train(self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None) -> TrainOutput:
        """Train according to the arguments.

        Args:
            resume_from_checkpoint: the checkpoint to resume from; True means the last one in the output folder.

        Returns:
            transformers' `TrainOutput`: `global_step`, `training_loss` (the mean over all steps) and `metrics`.

        Raises:
            ValueError: there are no data or no trainable parameters, or the checkpoint is missing or was trained with
                other settings.
            FloatingPointError: a loss or gradient is infinite or NaN. The last checkpoint was written before that step.
        """
        loop = self._start(resume_from_checkpoint)
        args, state, began = self.args, self.state, time.perf_counter()
        metric: float | None = None  # of the newest evaluation
        with TrainingBar(loop.steps, state.global_step, self._shows_bar()) as bar:
            for result in loop.run():
                bar.show(state.global_step, result.loss, result.tokens)
                if state.global_step % args.logging_steps == 0 or state.global_step == loop.steps:
                    self._log_training(loop, result, bar.tokens_per_second)
                if loop.is_due(args.eval_strategy, args.eval_steps):
                    metric = self._evaluate_for_best()
                if loop.is_due(args.save_strategy, args.save_steps):
                    self._save_checkpoint(loop, metric)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._check_best(state)
            self.model.update(read_arrays(self.folder / state.best_model_checkpoint, loop.arrays())["weights"])
        self.model.eval()
        if args.push_to_hub:
            self.push_to_hub()
        loss = state.total_loss / max(1, state.global_step)
        metrics = {"train_runtime": time.perf_counter() - began, "train_loss": loss, "epoch": state.epoch}
        return TrainOutput(state.global_step, loss, metrics)

    def compute_loss(self, model: Any, inputs: dict[str, mx.array]) -> mx.array:
        """Return the mean loss over the labels of a batch. A subclass may override it."""
        loss = model(**inputs).loss
        if loss is None:
            raise UserError(
                f"The model returned no loss for a batch with {', '.join(inputs)}. It needs labels: name the column "
                "'label' or 'labels'."
            )
        return loss

    def _start(self, resume: str | os.PathLike[str] | bool | None) -> TrainingLoop:
        """Prepare the model and the output folder, and load the checkpoint to resume from."""
        if self.train_dataset is None or not len(self.train_dataset):
            raise UserError("There are no training data: give MLXTrainer a train_dataset that is not empty.")
        for part in self.model.without_loss:  # weight decay would shrink these, as no gradient counters it
            module_at(self.model.base_model, part.rstrip(".")).freeze()
        refuse_quantized(self.model)
        if not tree_flatten(self.model.trainable_parameters()):
            raise UserError("All parameters are frozen: unfreeze some (model.unfreeze()), or add adapters.")
        distributed.on_rank_0(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        distributed.on_rank_0(lambda: remove_parts(self.folder))
        mx.random.seed(self.args.seed)
        if self.args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.update(tree_map(lambda x: x.astype(mx.float32), self.model.trainable_parameters()))
        state = self._new_state() if resume or self.args.save_strategy != "no" else TrainerState()
        loop = TrainingLoop(self.model, self.args, self.train_dataset, self._collate, self.compute_loss, state)
        if resume:
            loop.resume(self._last_checkpoint() if resume is True else Path(resume))
            self._check_best(loop.state)
        self.state, self.optimizer = loop.state, loop.optimizer
        if resume:
            self._rewrite_log()
        return loop

    def _new_state(self) -> TrainerState:
        """Return the state of a new training: its settings and its frozen parameters, which resuming compares."""
        settings = self.args.settings() | config_settings(self.model.config)
        settings |= {"model class": type(self.model).__name__, "ranks": distributed.size(), "device": device_name()}
        if has_adapters(self.model):
            config = asdict(next(iter(adapted_layers(self.model).values())).config)
            settings |= {ADAPTER_OPTIONS.get(name, name): value for name, value in config.items()}
        if "training data" not in self.settings:
            settings |= self._data_settings()
        settings |= self.settings
        frozen = None if "model" in self.settings else checksum_of_arrays(self._frozen_parameters())
        return TrainerState(settings=json.loads(json.dumps(settings)), frozen=frozen)

    def _frozen_parameters(self) -> dict[str, mx.array]:
        """Return {name: array} of the parameters that are not trained and that the loss depends on."""
        parameters: Any = tree_flatten(self.model.parameters())
        trained: Any = tree_flatten(self.model.trainable_parameters(), destination={})
        without_loss = tuple(self.model.without_loss)
        prefix = f"{self.model.base_model_prefix}."
        return {
            name: array
            for name, array in parameters
            if name not in trained and not name.removeprefix(prefix).startswith(without_loss)
        }

    def _data_settings(self) -> dict[str, Any]:
        """Return the settings for the data, as far as their items can be compared."""
        sets = {"training data": self.train_dataset}
        if self.args.load_best_model_at_end:
            sets["validation data"] = self.eval_dataset
        settings: dict[str, Any] = {}
        for name, data in sets.items():
            if hasattr(data, "set_epoch"):
                data.set_epoch(0)
            checksum = None if data is None else checksum_of_items(data, self._columns)
            settings[name] = None if checksum is None else content("", checksum)
        return settings

    def _last_checkpoint(self) -> Path:
        found = checkpoints_in(self.folder)
        if not found:
            raise UserError(f"No checkpoint found in {self.folder} to resume from.")
        return found[-1]

    def _check_best(self, state: TrainerState) -> None:
        """Raise UserError if the best checkpoint is damaged."""
        if state.best_model_checkpoint is not None:
            best = self.folder / state.best_model_checkpoint
            check_checkpoint(best, f"{best.name} is the best model so far: restore it, or start again in a new folder.")

    def _collate(self, data: Any, items: np.ndarray) -> Batch:
        """Return the batch of these items of a data set."""
        features = [{k: v for k, v in data[int(item)].items() if k in self._columns} for item in items]
        return {name: np.asarray(value) for name, value in self.data_collator(features).items()}

    # Evaluation

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return, and log, the mean loss over the labels of a data set and the result of `compute_metrics`.

        Args:
            eval_dataset: the data set; by default the trainer's `eval_dataset`.
            metric_key_prefix: prefix of the names: "eval" gives "eval_loss".
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is None:
            raise UserError("There are no evaluation data: give MLXTrainer an eval_dataset.")
        metrics: Any = self._predict(data, metric_key_prefix, self.compute_metrics is not None).metrics
        self._log(metrics)
        return metrics

    def predict(self, test_dataset: Any, metric_key_prefix: str = "test") -> PredictionOutput:
        """Return predictions for a data set, in its order and padded with −100, as transformers' `PredictionOutput`."""
        return self._predict(test_dataset, metric_key_prefix, True)

    def _predict(self, data: Any, prefix: str, keep: bool) -> PredictionOutput:
        was_training = self.model.training
        self.model.eval()
        began, loss, count = time.perf_counter(), 0.0, 0
        batches = batches_by_rows(range(len(data)), self.args.per_device_eval_batch_size)
        rows: list[tuple[np.ndarray, np.ndarray]] = []  # predictions and labels of this rank's batches
        for items in batches[distributed.rank() :: distributed.size()]:
            batch = self._collate(data, items)
            outputs = self.model(**to_mlx(batch))
            labels = label_count(batch)
            if outputs.loss is not None and labels:  # the mean loss over no labels is NaN
                loss, count = loss + outputs.loss.item() * labels, count + labels
            if keep:
                rows.append((np.array(outputs.logits.astype(mx.float32)), batch.get("labels", np.empty(0))))
            else:
                mx.eval(outputs.loss)
        self.model.train(was_training)
        loss, count = self._sum_over_ranks(loss), distributed.all_sum(count)
        predictions: Any = None
        label_ids: Any = None
        if keep:
            predictions, label_ids = self._gather(rows, len(batches))
        metrics: dict[str, float] = {}
        if count:
            metrics["loss"] = loss / count
        if keep and self.compute_metrics is not None and label_ids is not None:
            metrics |= self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=label_ids))
        metrics = {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": v for name, v in metrics.items()}
        metrics[f"{prefix}_runtime"] = time.perf_counter() - began
        return PredictionOutput(predictions=predictions, label_ids=label_ids, metrics=metrics)

    @staticmethod
    def _sum_over_ranks(value: float) -> float:
        """Return the sum of the ranks' values, in float32."""
        if distributed.size() == 1:
            return value
        total: Any = distributed.all_sum_array(mx.array(value, dtype=mx.float32))
        return total.item()

    def _gather(self, rows: list[tuple[np.ndarray, np.ndarray]], batches: int) -> tuple[Any, Any]:
        """Return predictions and labels of all ranks' batches, in the order of the data."""
        file, named = io.BytesIO(), dict[str, np.ndarray]()
        for i, (prediction, label) in enumerate(rows):
            named |= {f"p{i}": prediction, f"l{i}": label}
        np.savez(file, **named)  # type: ignore[arg-type]
        parts = [np.load(io.BytesIO(data)) for data in distributed.gather(file.getvalue(), self.state.global_step)]
        turns = [(parts[i % len(parts)], i // len(parts)) for i in range(batches)]
        predictions = join([part[f"p{i}"] for part, i in turns])
        labels = [part[f"l{i}"] for part, i in turns]
        return predictions, join(labels) if all(x.size for x in labels) else None

    def _evaluate_for_best(self) -> float | None:
        """Evaluate and return the metric that chooses the best model, or None if it was not measured."""
        metrics = self.evaluate()
        metric = metrics.get(self.args.best_metric)
        if self.args.load_best_model_at_end and metric is None:
            raise UserError(
                f"metric_for_best_model={self.args.metric_for_best_model!r} was not measured. It must be one of "
                f"{', '.join(metrics)}."
            )
        return metric

    # Files

    def save_model(self, output_dir: str | os.PathLike[str] | None = None) -> None:
        """Write model and tokenizer as a folder for `from_pretrained`, or the adapters of a model that has some.

        The files appear together.
        """
        folder = Path(self.folder if output_dir is None else output_dir)
        stale = [] if has_adapters(self.model) else stale_weights()

        def save() -> None:
            with replace_files(folder, stale) as part:
                self._write_model(part)

        distributed.on_rank_0(save)

    def _write_model(self, folder: Path) -> None:
        if has_adapters(self.model):
            save_adapter(self.model, folder)
        else:
            self.model.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def push_to_hub(self, **kwargs: Any) -> Any:
        """Publish the model, and the tokenizer if there is one, on the Hub; arguments as in `model.push_to_hub`."""
        from mlx_esm_hf.hub import publish

        self.save_model()
        name = self.args.hub_model_id or self.folder.resolve().name
        return distributed.on_rank_0(lambda: publish(self.folder, name, **kwargs))

    def _save_checkpoint(self, loop: TrainingLoop, metric: float | None) -> None:
        state = self.state
        if self.args.load_best_model_at_end and self._is_better(metric):
            state.best_metric = metric
            state.best_model_checkpoint = f"checkpoint-{state.global_step}"
        state.settings |= config_settings(self.model.config)
        arrays = loop.arrays()
        distributed.on_rank_0(lambda: write_checkpoint(self.folder, state, arrays, self._write_model))
        distributed.on_rank_0(lambda: rotate(self.folder, self.args.save_total_limit, state.best_model_checkpoint))

    def _is_better(self, metric: float | None) -> bool:
        """Return whether a metric is better than the best one. One that is not finite never is."""
        best = self.state.best_metric
        if metric is None or not math.isfinite(metric):
            return False
        if best is None:
            return True
        return metric > best if self.args.higher_is_better else metric < best

    def _log_training(self, loop: TrainingLoop, result: StepResult, tokens_per_second: float) -> None:
        state = self.state
        last = next((line["step"] for line in reversed(state.log_history) if "loss" in line), 0)
        entry = {
            "loss": state.loss_since_log / (state.global_step - last),
            "grad_norm": result.grad_norm,
            "learning_rate": self.args.learning_rate_at(state.global_step - 1, loop.steps),
            "tokens": state.tokens,
            "tokens_per_second": tokens_per_second,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }
        state.loss_since_log = 0.0
        self._log(entry)

    def _log(self, entry: dict[str, Any]) -> None:
        """Add a line to the log."""
        line = entry | {"epoch": self.state.epoch, "step": self.state.global_step}
        self.state.log_history.append(line)
        if distributed.is_rank_0() and self.folder.is_dir():
            with open(self.folder / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _rewrite_log(self) -> None:
        """Write the log as of the checkpoint, without the lines that came after it."""
        lines = "".join(json.dumps(line) + "\n" for line in self.state.log_history)
        distributed.on_rank_0(lambda: replace_file(self.folder / LOG, lines.encode()))

    def _shows_bar(self) -> bool | None:
        """Return whether to show the progress bar; None means on a terminal only."""
        if not distributed.is_rank_0() or self.args.disable_tqdm:
            return False
        return None if self.args.disable_tqdm is None else True


def refuse_quantized(model: MLXPreTrainedModel) -> None:
    """Raise UserError if a part of a model is trained that has quantized layers, which would silently stay as they are.

    A part is the base model or a head. Adapters are trained next to quantized layers.
    """
    if has_adapters(model):
        return
    for name, part in model.children().items():
        quantized = [path for path, layer in layers(part) if spec_of(layer)] if isinstance(part, nn.Module) else []
        if quantized and tree_flatten(part.trainable_parameters()):
            raise UserError(
                f"{name}.{quantized[0]} is quantized and cannot be trained, so only the other parameters would be. "
                "Train adapters (--train lora) or the head alone (--train head, model.base_model.freeze()), or make a "
                "plain model first: mlx-esm convert --dequantize."
            )


def join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate the rows of several batches, padding shorter rows with −100."""
    if arrays[0].ndim < 2:
        return np.concatenate(arrays)
    width = max(x.shape[1] for x in arrays)
    padded = [
        np.pad(x, [(0, 0), (0, width - x.shape[1]), *[(0, 0)] * (x.ndim - 2)], constant_values=IGNORE_INDEX)
        for x in arrays
    ]
    return np.concatenate(padded)
