"""`MLXTrainer`: one loop that trains any model of this library; mirrors transformers' `Trainer`."""

from __future__ import annotations

import inspect
import io
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from transformers import DataCollatorWithPadding, default_data_collator
from transformers.trainer_utils import EvalPrediction, PredictionOutput, TrainOutput

from mlx_esm_hf import ops
from mlx_esm_hf.errors import NonFiniteLossError, UserError
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel, module_at
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.files import replace_file
from mlx_esm_hf.training.adapters import has_adapters, save_adapter
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.checkpoints import (
    TrainerState,
    checkpoints_in,
    read_arrays,
    read_state,
    remove_parts,
    rotate,
    write_checkpoint,
)
from mlx_esm_hf.training.optimizer import AdamW
from mlx_esm_hf.training.order import epoch_of, rows_in_batches, tokens_in_batches
from mlx_esm_hf.training.progress import TrainingBar

logger = logging.getLogger(__name__)

LOG = "log.jsonl"

Batch = dict[str, np.ndarray]


class MLXTrainer:
    """Trains a model, evaluates it, and writes checkpoints that it goes on from, to the same numbers.

    Args:
        model: with a head whose call returns a loss where it is given labels.
        args: the settings.
        data_collator: makes a batch of a list of items, as NumPy arrays: one of transformers' with
            `return_tensors="np"`, or a function. By default items are padded by the tokenizer, if there is one.
        train_dataset, eval_dataset: whatever has a length and gives items, as dictionaries, by number; such as those of
            `datasets`. Columns that the model does not take are left out.
        processing_class: the tokenizer, which is saved beside the model.
        compute_metrics: from transformers' `EvalPrediction` (predictions, label_ids) to {name: number}.

    Under `mlx.launch` the ranks share each step: a step's batch is what all of them are given.

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
        self.state = TrainerState()
        self.folder = Path(self.args.output_dir)
        self.optimizer: Any = None
        # Of the training that runs: its steps, batches to a step, the tokens of each item, the items of the last step,
        # whether that ended an epoch, its loss and norm, and the metric of the last evaluation.
        self._steps, self._together = 0, 1
        self._lengths: np.ndarray | None = None
        self._items = np.empty(0, np.int64)
        self._ends_epoch = False
        self._last_loss = self._last_norm = math.nan
        self._newest: float | None = None
        self._gradients: Any = None
        self._update: Any = None
        self._columns = {*inspect.signature(type(model).__call__).parameters, "label", "label_ids"}

    # The loop

    def train(self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None) -> TrainOutput:
        """Train as the arguments say.

        Args:
            resume_from_checkpoint: a checkpoint to go on from; True, the last one of the output folder.

        Returns:
            transformers' `TrainOutput`: `global_step`, `training_loss` (the mean over all steps) and `metrics`.

        Raises:
            ValueError: there is nothing to train or to train with, or no checkpoint to go on from, or that of a
                training with other settings.
            FloatingPointError: a loss or gradient that is no number. The last checkpoint is from before.
        """
        self._prepare(resume_from_checkpoint)
        args, state, began = self.args, self.state, time.perf_counter()
        with TrainingBar(self._steps, state.global_step, self._shows_bar()) as bar:
            while state.global_step < self._steps:
                for batches in self._steps_of_epoch():
                    tokens = self._step(batches)
                    bar.show(state.global_step, self._last_loss, tokens)
                    ends = state.global_step == self._steps
                    if state.global_step % args.logging_steps == 0 or ends:
                        self._log_training(bar)
                    if self._due(args.eval_strategy, args.eval_steps):
                        self._evaluate_and_compare()
                    if self._due(args.save_strategy, args.save_steps):
                        self._save_checkpoint()
                    if ends:
                        break
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.model.update(read_arrays(self.folder / state.best_model_checkpoint)["weights"])
        self.model.eval()
        if args.push_to_hub:
            self.push_to_hub()
        loss = state.total_loss / max(1, state.global_step)
        metrics = {"train_runtime": time.perf_counter() - began, "train_loss": loss, "epoch": state.epoch}
        return TrainOutput(state.global_step, loss, metrics)

    def _step(self, batches: Sequence[Batch]) -> int:
        """One step of the optimiser on this rank's batches; returns how many real tokens all ranks gave.

        The loss of a step is the mean over all labels of its batches, so it does not matter how they are cut.
        """
        self.model.train()
        labels = distributed.all_sum(sum(label_count(batch) for batch in batches))
        loss: Any = mx.array(0.0)
        gradients: Any = None
        for batch in batches:
            share = mx.array(label_count(batch) * distributed.size() / max(1, labels))
            more, new = self._gradients(arrays_of(batch), share)
            loss, gradients = loss + more, new if gradients is None else tree_map(mx.add, gradients, new)
            if len(batches) > 1:
                mx.eval(loss, gradients)
        if distributed.size() > 1:
            if gradients is None:
                gradients = tree_map(mx.zeros_like, self.model.trainable_parameters())
            gradients = nn.average_gradients(gradients)
            loss = distributed.all_sum_array(loss) / distributed.size()
        self.optimizer.state["learning_rate"] = mx.array(
            self.args.learning_rate_at(self.state.global_step, self._steps)
        )
        norm = self._update(gradients)
        del gradients
        mx.eval(loss, norm, self.model.parameters(), self.optimizer.state, mx.random.state)
        self._last_loss, self._last_norm = loss.item(), norm.item()
        if not (math.isfinite(self._last_loss) and math.isfinite(self._last_norm)):
            raise NonFiniteLossError(self._not_finite())
        self.state.global_step += 1
        self.state.loss_since_log += self._last_loss
        self.state.total_loss += self._last_loss
        tokens = distributed.all_sum(sum(token_count(batch) for batch in batches))
        self.state.tokens += tokens
        return tokens

    def _loss(self, inputs: dict[str, mx.array], share: mx.array) -> mx.array:
        """The part that a batch has in the loss of its step."""
        if self.args.bf16:  # the weights stay in float32, and are rounded for the computation alone
            weights = self.model.trainable_parameters()
            self.model.update(tree_map(lambda x: x.astype(mx.bfloat16), weights))
            loss = self.compute_loss(self.model, inputs)
            self.model.update(weights)
        else:
            loss = self.compute_loss(self.model, inputs)
        return loss.astype(mx.float32) * share

    def compute_loss(self, model: Any, inputs: dict[str, mx.array]) -> mx.array:
        """The mean loss over the labels of a batch; a subclass may have another one."""
        loss = model(**inputs).loss
        if loss is None:
            raise UserError(
                f"The model returned no loss: the batch has {', '.join(inputs)}. It needs labels: name the column "
                "'label' or 'labels'."
            )
        return loss

    def _not_finite(self) -> str:
        return (
            f"Step {self.state.global_step + 1}: the loss is {self._last_loss}, the norm of the gradients "
            f"{self._last_norm}. The step's batch has the items {self._items.tolist()} of the training data. Nothing "
            "was written since the last checkpoint: look at these items, or go on from it with a lower learning rate."
        )

    # What is trained with

    def _steps_of_epoch(self) -> Iterator[list[Batch]]:
        """This rank's batches of each step of the epoch that runs, but for the steps that are done."""
        state, data = self.state, self.train_dataset
        if hasattr(data, "set_epoch"):
            data.set_epoch(state.epochs_done)
        order = self._order(state.epochs_done)
        steps = -(-len(order) // self._together)
        while state.epoch_step < steps:
            first = state.epoch_step * self._together
            turn = order[first : first + self._together]
            self._items = np.concatenate(turn)
            state.epoch_step += 1
            state.epoch = state.epochs_done + state.epoch_step / steps
            self._ends_epoch = state.epoch_step == steps
            if self._ends_epoch:
                state.epochs_done, state.epoch_step = state.epochs_done + 1, 0
            yield [self._batch(data, items) for items in turn[distributed.rank() :: distributed.size()]]
            if self._ends_epoch:
                return

    def _order(self, epoch: int) -> list[np.ndarray]:
        """The items of the batches of an epoch."""
        data, args = self.train_dataset, self.args
        items = data.order(args.seed, epoch) if hasattr(data, "order") else epoch_of(len(data), args.seed, epoch)
        if args.batch_tokens is None:
            return rows_in_batches(items, args.per_device_train_batch_size)
        if self._lengths is None:
            self._lengths = getattr(data, "lengths", None)
            if self._lengths is None:
                self._lengths = np.array([len(data[i]["input_ids"]) for i in range(len(data))])
        rng = np.random.default_rng((args.seed, epoch, 1))
        return tokens_in_batches(items, self._lengths, args.batch_tokens, rng)

    def _batch(self, data: Any, items: np.ndarray) -> Batch:
        features = [{k: v for k, v in data[int(item)].items() if k in self._columns} for item in items]
        return {name: np.asarray(value) for name, value in self.data_collator(features).items()}

    # Beginning, and going on

    def _prepare(self, resume: str | os.PathLike[str] | bool | None) -> None:
        args = self.args
        if self.train_dataset is None or not len(self.train_dataset):
            raise UserError("There is nothing to train with: give MLXTrainer a train_dataset.")
        for part in self.model.without_loss:  # else weight decay would wear it away
            module_at(self.model.base_model, part.rstrip(".")).freeze()
        if not tree_flatten(self.model.trainable_parameters()):
            raise UserError("All parameters are frozen: unfreeze some (model.unfreeze()), or add adapters.")
        distributed.on_rank_0(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        distributed.on_rank_0(lambda: remove_parts(self.folder))
        mx.random.seed(args.seed)
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        full = tree_map(lambda x: x.astype(mx.float32), self.model.trainable_parameters())
        self.model.update(full)
        self._together = args.gradient_accumulation_steps * distributed.size()  # batches to a step
        epoch_steps = -(-len(self._order(0)) // self._together)
        self._steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch_steps)

        self.optimizer = AdamW(
            full,
            args.learning_rate,
            (args.adam_beta1, args.adam_beta2),
            args.adam_epsilon,
            args.weight_decay,
            args.max_grad_norm,
        )
        self.state = TrainerState(settings=self._settings())
        if resume:
            self._resume(resume)
        state = [self.model.state, self.optimizer.state, mx.random.state]
        self._gradients = ops.compiled(nn.value_and_grad(self.model, self._loss), [state[0], state[2]])
        self._update = ops.compiled(lambda gradients: self.optimizer.update(self.model, gradients), state[:2])

    def _resume(self, resume: str | os.PathLike[str] | bool) -> None:
        if resume is True:
            found = checkpoints_in(self.folder)
            if not found:
                raise UserError(f"{self.folder} holds no checkpoint to go on from.")
            path = found[-1]
        else:
            path = Path(resume)  # type: ignore[arg-type]
        state = read_state(path)
        differences = [
            f"{name}: {state.settings.get(name)!r} there, {value!r} here"
            for name, value in self.state.settings.items()
            if state.settings.get(name) != value
        ]
        if differences:
            raise UserError(
                f"{path} is of another training ({'; '.join(differences)}): go on with the same settings, or begin "
                "anew from its weights."
            )
        self.state = state
        arrays = read_arrays(path)
        self.model.update(arrays["weights"])
        self.optimizer.state = arrays["optimizer"]
        high, low = arrays["random"].tolist()
        mx.random.seed(high << 32 | low)  # which is the state itself
        self._write_log()

    def _settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        args = self.args
        names = ["learning_rate", "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"]
        names += ["max_grad_norm", "bf16", "seed", "batch_tokens"]
        return {name: getattr(args, name) for name in names} | {
            "batch_size": args.per_device_train_batch_size if args.batch_tokens is None else None,
            "batches": self._together,
            "steps": self._steps,
            "items": len(self.train_dataset),
        }

    # Evaluation

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The mean loss over the labels of a data set, and what `compute_metrics` makes of the predictions; logged.

        Args:
            eval_dataset: by default the trainer's.
            metric_key_prefix: of the names: "eval" gives "eval_loss".
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is None:
            raise UserError("There is nothing to evaluate with: give MLXTrainer an eval_dataset.")
        metrics: Any = self._predict(data, metric_key_prefix, self.compute_metrics is not None).metrics
        self._log(metrics)
        return metrics

    def predict(self, test_dataset: Any, metric_key_prefix: str = "test") -> PredictionOutput:
        """Predictions for a data set, in its order, padded with −100: transformers' `PredictionOutput`."""
        return self._predict(test_dataset, metric_key_prefix, True)

    def _predict(self, data: Any, prefix: str, keep: bool) -> PredictionOutput:
        was_training = self.model.training
        self.model.eval()
        began, loss, count = time.perf_counter(), 0.0, 0
        order = rows_in_batches(range(len(data)), self.args.per_device_eval_batch_size)
        rows: list[tuple[np.ndarray, np.ndarray]] = []  # predictions and labels of this rank's batches
        for items in order[distributed.rank() :: distributed.size()]:
            batch = self._batch(data, items)
            outputs = self.model(**arrays_of(batch))
            if outputs.loss is not None:
                labels = label_count(batch)
                loss, count = loss + outputs.loss.item() * labels, count + labels
            if keep:
                rows.append((np.array(outputs.logits.astype(mx.float32)), batch.get("labels", np.empty(0))))
            else:
                mx.eval(outputs.loss)
        self.model.train(was_training)
        loss, count = self._over_ranks(loss), distributed.all_sum(count)
        predictions: Any = None
        label_ids: Any = None
        if keep:
            predictions, label_ids = self._gathered(rows, len(order))
        metrics: dict[str, float] = {}
        if count:
            metrics["loss"] = loss / count
        if keep and self.compute_metrics is not None and label_ids is not None:
            metrics |= self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=label_ids))
        metrics = {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": v for name, v in metrics.items()}
        metrics[f"{prefix}_runtime"] = time.perf_counter() - began
        return PredictionOutput(predictions=predictions, label_ids=label_ids, metrics=metrics)  # type: ignore[arg-type]

    @staticmethod
    def _over_ranks(value: float) -> float:
        """The sum of what the ranks say, in float32."""
        if distributed.size() == 1:
            return value
        total: Any = distributed.all_sum_array(mx.array(value, dtype=mx.float32))
        return total.item()

    def _gathered(self, rows: list[tuple[np.ndarray, np.ndarray]], batches: int) -> tuple[Any, Any]:
        """Predictions and labels of all ranks' batches, in the order of the data."""
        file, named = io.BytesIO(), dict[str, np.ndarray]()
        for i, (prediction, label) in enumerate(rows):
            named |= {f"p{i}": prediction, f"l{i}": label}
        np.savez(file, **named)  # type: ignore[arg-type]
        parts = [np.load(io.BytesIO(data)) for data in distributed.gather(file.getvalue(), self.state.global_step)]
        turns = [(parts[i % len(parts)], i // len(parts)) for i in range(batches)]
        predictions = join([part[f"p{i}"] for part, i in turns])
        labels = [part[f"l{i}"] for part, i in turns]
        return predictions, join(labels) if all(x.size for x in labels) else None

    def _evaluate_and_compare(self) -> None:
        metrics = self.evaluate()
        self._newest = metrics.get(self.args.best_metric)
        if self.args.load_best_model_at_end and self._newest is None:
            raise UserError(
                f"metric_for_best_model={self.args.metric_for_best_model!r} is none of what was measured: "
                f"{', '.join(metrics)}."
            )

    # What is written

    def save_model(self, output_dir: str | os.PathLike[str] | None = None) -> None:
        """Write model and tokenizer as an ordinary folder for `from_pretrained`; of a model with adapters, these."""
        folder = Path(self.folder if output_dir is None else output_dir)
        distributed.on_rank_0(lambda: self._save_model(folder))

    def _save_model(self, folder: Path) -> None:
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

    def _save_checkpoint(self) -> None:
        state = self.state
        if self.args.load_best_model_at_end and self._is_better():
            state.best_metric = self._newest
            state.best_model_checkpoint = f"checkpoint-{state.global_step}"
        arrays = {
            "weights": self.model.trainable_parameters(),
            "optimizer": self.optimizer.state,
            "random": mx.random.state[0],  # type: ignore[index]
        }
        distributed.on_rank_0(lambda: write_checkpoint(self.folder, state, arrays, self._save_model))
        distributed.on_rank_0(lambda: rotate(self.folder, self.args.save_total_limit, state.best_model_checkpoint))

    def _due(self, strategy: str, every: int | None) -> bool:
        """Whether what happens by this strategy happens after the step that was just done: after the last one, too."""
        if strategy == "no":
            return False
        step = self.state.global_step
        return step == self._steps or (self._ends_epoch if strategy == "epoch" else step % (every or 1) == 0)

    def _is_better(self) -> bool:
        best, newest = self.state.best_metric, self._newest
        if best is None or newest is None:
            return newest is not None
        return newest > best if self.args.more_is_better else newest < best

    def _log_training(self, bar: TrainingBar) -> None:
        state = self.state
        last = next((line["step"] for line in reversed(state.log_history) if "loss" in line), 0)
        entry = {
            "loss": state.loss_since_log / (state.global_step - last),
            "grad_norm": self._last_norm,
            "learning_rate": self.args.learning_rate_at(state.global_step - 1, self._steps),
            "tokens": state.tokens,
            "tokens_per_second": bar.tokens_per_second,
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

    def _write_log(self) -> None:
        """The log as it was at the checkpoint, without the lines that came after it."""
        lines = "".join(json.dumps(line) + "\n" for line in self.state.log_history)
        distributed.on_rank_0(lambda: replace_file(self.folder / LOG, lines.encode()))

    def _shows_bar(self) -> bool | None:
        """None: on a terminal."""
        if not distributed.is_rank_0() or self.args.disable_tqdm:
            return False
        return None if self.args.disable_tqdm is None else True


def label_count(batch: Mapping[str, np.ndarray]) -> int:
    """Labels of a batch that take part in its loss."""
    return int((batch["labels"] != IGNORE_INDEX).sum()) if "labels" in batch else 0


def token_count(batch: Mapping[str, np.ndarray]) -> int:
    """Real tokens of a batch."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].size if mask is None else mask.sum())


def arrays_of(batch: Mapping[str, np.ndarray]) -> dict[str, mx.array]:
    return {name: mx.array(value) for name, value in batch.items()}


def join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of several batches as one array, those of shorter ones padded with −100."""
    if arrays[0].ndim < 2:
        return np.concatenate(arrays)
    width = max(x.shape[1] for x in arrays)
    padded = [
        np.pad(x, [(0, 0), (0, width - x.shape[1]), *[(0, 0)] * (x.ndim - 2)], constant_values=IGNORE_INDEX)
        for x in arrays
    ]
    return np.concatenate(padded)
