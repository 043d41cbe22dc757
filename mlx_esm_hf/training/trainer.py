"""`MLXTrainer`, which trains any model of this library; mirrors transformers' `Trainer`."""

from __future__ import annotations

import inspect
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from transformers import DataCollatorWithPadding, default_data_collator
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput, TrainOutput

from mlx_esm_hf.checkpoint.resolve import SAFETENSORS
from mlx_esm_hf.checkpoint.write import stale_weights, write_safetensors
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX
from mlx_esm_hf.modeling_layers import module_at
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.quantization.layers import layers, spec_of
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.device import device_name
from mlx_esm_hf.runtime.files import replace_file, replace_files
from mlx_esm_hf.training.adapters import has_adapters, save_adapter
from mlx_esm_hf.training.adapters.model import adapted_layers
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.callbacks import Callbacks, Control
from mlx_esm_hf.training.checkpoints import (
    STATE,
    TrainerState,
    check_checkpoint,
    checkpoints_in,
    read_arrays,
    remove_parts,
    rotate,
    write_checkpoint,
)
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
from mlx_esm_hf.training.loop import StepResult, TrainingLoop, label_count, to_mlx
from mlx_esm_hf.training.optimizer import create_optimizer, is_decayed, prepare_optimizer
from mlx_esm_hf.training.progress import TrainingBar
from mlx_esm_hf.training.reporting import tracker_callbacks
from mlx_esm_hf.training.sampling import EpochBatches, grouped
from mlx_esm_hf.training.settings import checksum_of_arrays, checksum_of_items, config_settings, content

LOG = "log.jsonl"

# Names, in messages, of fields of `LoraConfig`: those of the options of `mlx-esm finetune`.
ADAPTER_OPTIONS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}


# Methods of transformers' Trainer that are never called here, and so must not be overridden.
NOT_CALLED = {
    "_build_accelerator_args", "_clip_grad_norm", "_defer_fsdp_gradient_reduction", "_determine_best_metric",
    "_evaluate", "_finalize_training", "_finish_current_push", "_get_collator_with_removed_columns", "_get_dataloader",
    "_get_eval_sampler", "_get_grad_norm", "_get_learning_rate", "_get_num_items_in_batch", "_get_output_dir",
    "_has_mixed_mesh_grads", "_hp_search_setup", "_init_training_state", "_inner_training_loop",
    "_issue_warnings_after_load", "_load_best_model", "_load_callback_state", "_load_from_checkpoint",
    "_load_optimizer_and_scheduler", "_load_rng_state", "_load_scaler", "_maybe_log_save_evaluate",
    "_mixed_mesh_grad_norm", "_move_model_to_device", "_prepare_context_parallel_inputs", "_prepare_for_training",
    "_prepare_input", "_prepare_inputs", "_push_from_checkpoint", "_remove_unused_columns", "_report_to_hp_search",
    "_run_epoch", "_save", "_save_checkpoint", "_save_optimizer_and_scheduler", "_save_rng_state", "_save_scaler",
    "_set_signature_columns_if_needed", "_sync_replicated_trainable_parameters", "_track_num_input_tokens",
    "_tune_save_checkpoint", "_update_auto_batch_size", "_validate_args", "_wrap_model",
    "autocast_smart_context_manager", "compute_loss_context_manager", "create_accelerator_and_postprocess",
    "create_model_card", "end", "floating_point_ops", "get_batch_samples", "get_cp_size", "get_decay_parameter_names",
    "get_learning_rates", "get_optimizer_cls_and_kwargs", "get_optimizer_group", "get_sp_size",
    "get_total_train_batch_size", "get_tp_size", "hyperparameter_search", "init_hf_repo", "loss_is_scaled_for_ga",
    "metrics_format", "num_examples", "set_initial_training_values", "store_flos", "training_step",
}  # fmt: skip


class MLXTrainer:
    """Trains and evaluates a model, and writes checkpoints from which a training resumes to identical results.

    A subclass may override `compute_loss`, `prediction_step`, `evaluation_loop`, `evaluate`, `predict`, `log`,
    `create_optimizer`, `create_scheduler`, `create_optimizer_and_scheduler`, `get_train_dataloader`,
    `get_eval_dataloader`, `get_test_dataloader`, `_get_train_sampler`, `call_model_init` and `save_model`. Overriding
    another method of transformers' Trainer raises a TypeError, since it would never be called.

    Args:
        model: a model with a head, which returns a loss when the batch has labels, or any `mlx.nn.Module` that returns
            a loss, a dictionary with "loss", or a tuple that begins with it.
        args: the settings.
        data_collator: makes a batch of NumPy arrays from a list of items: one of transformers' with
            `return_tensors="np"`, or a function. By default the tokenizer, if given, pads the items.
        train_dataset: anything with a length whose items are dictionaries, such as a data set of `datasets`, or an
            iterable of them. Columns that the model does not accept are dropped.
        eval_dataset: the same with a length, or a dictionary of such data sets, whose metrics get their names:
            "eval_<name>_loss".
        processing_class: the tokenizer, saved next to the model.
        model_init: returns the model, instead of `model`. Each call of `train` begins with a new one.
        compute_loss_func: a function from (outputs, labels, num_items_in_batch) to the mean loss of a batch.
        compute_metrics: a function from transformers' `EvalPrediction` (predictions, label_ids) to {name: number}.
        callbacks: transformers' `TrainerCallback`s, such as `EarlyStoppingCallback`, objects or classes.
        optimizers: (optimizer, schedule), each may be None: an optimizer of `mlx.optimizers` or `AdamW` of
            `mlx_esm_hf.training.optimizer`, and a function from the step, counted from 0, to the learning rate.
        optimizer_cls_and_kwargs: a class of `mlx.optimizers` and its arguments, instead of an optimizer.
        preprocess_logits_for_metrics: a function from (logits, labels) to what evaluation keeps of them.
        tokenizer: `processing_class` under its older name.

    Attributes:
        settings: JSON values that determine the result besides what the trainer knows, by name. Checkpoints store them,
            and resuming with others is refused.
        state: the progress of the training.
        optimizer: the optimizer of the last call of `train`.
        lr_scheduler: the schedule of the last call of `train`; None for that of the arguments.

    Under `mlx.launch` the ranks share each step: the step's batch consists of the batches of all ranks.

    Raises:
        TypeError: a subclass overrides a method that is never called.
        UserError: neither or both of `model` and `model_init` are given, or an evaluation data set has no length.

    Example:
        >>> trainer = MLXTrainer(model, MLXTrainingArguments("out"), train_dataset=data, processing_class=tokenizer)
        >>> trainer.train()
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__mro__[: cls.__mro__.index(MLXTrainer)]
        if unused := sorted(NOT_CALLED & {name for base in own for name in vars(base)}):
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(unused)}, which MLXTrainer never calls. Override compute_loss, "
                "prediction_step, evaluation_loop, log, create_optimizer, create_scheduler or a get_..._dataloader, or "
                "pass callbacks."
            )

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError, with advice for the methods of transformers' Trainer."""
        if name == "hyperparameter_search":
            raise AttributeError(
                "MLXTrainer has no hyperparameter_search: choose settings in a loop, and train with each."
            )
        if name in NOT_CALLED:
            raise AttributeError(f"MLXTrainer has no {name}, a method of transformers' Trainer.")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __init__(
        self,
        model: nn.Module | None = None,
        args: MLXTrainingArguments | None = None,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[[], nn.Module] | None = None,
        compute_loss_func: Callable[..., mx.array] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Callable[..., Any], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        tokenizer: Any = None,
    ):
        self.args = args or MLXTrainingArguments()
        if (model is None) == (model_init is None):
            raise UserError("MLXTrainer needs either a model or a model_init.")
        self.model_init = model_init
        self.model: Any = self.call_model_init() if model is None else model
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        for name, data in _named(eval_dataset).items():
            if data is not None and not hasattr(data, "__len__"):
                raise UserError(f"The evaluation data{f' {name!r}' if name else ''} have no length: pass a list.")
        self.processing_class = tokenizer if processing_class is None else processing_class
        self.compute_loss_func, self.compute_metrics = compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        if data_collator is None and self.processing_class is not None:
            data_collator = DataCollatorWithPadding(self.processing_class, return_tensors="np")
        self.data_collator = data_collator or (lambda items: default_data_collator(items, return_tensors="np"))
        self.settings: dict[str, Any] = {}
        self.state = TrainerState()
        self.control = Control()
        self._given_optimizers = optimizers
        if optimizer_cls_and_kwargs is not None:
            if optimizers[0] is not None:
                raise UserError("Give MLXTrainer either an optimizer or optimizer_cls_and_kwargs.")
            optimizer_class, options = optimizer_cls_and_kwargs
            self._given_optimizers = (optimizer_class(**options), optimizers[1])
        self._ignored_outputs: list[str] | None = None
        self.optimizer: Any = None
        self.lr_scheduler: Any = None
        self.folder = Path(self.args.output_dir)
        self.label_names = self.args.label_names or ["labels"]
        self.callbacks = Callbacks([*(callbacks or []), *tracker_callbacks(self.args)])
        parameters = inspect.signature(type(self.model).__call__).parameters.values()
        named = {p.name for p in parameters if p.kind != p.VAR_KEYWORD}
        self._columns = {*named, "label", "label_ids", *self.label_names}
        self._logged_step = 0  # of the last line with a loss
        self._call("on_init_end")

    # Training

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        *,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train according to the arguments.

        Args:
            resume_from_checkpoint: the checkpoint to resume from; True means the last one in the output folder.
            ignore_keys_for_eval: outputs of the model that predictions leave out in evaluations.

        Returns:
            transformers' `TrainOutput`: `global_step`, `training_loss` (the mean over all steps) and `metrics`.

        Raises:
            ValueError: there are no data or no trainable parameters, or the checkpoint is missing or was trained with
                other settings.
            FloatingPointError: a loss or gradient is infinite or NaN. The last checkpoint was written before that step.
        """
        if self.model_init is not None:
            self.model = self.call_model_init()
        self._ignored_outputs = ignore_keys_for_eval
        loop = self._start(resume_from_checkpoint)
        args, state, began = self.args, self.state, time.perf_counter()
        first = state.global_step
        self.control = Control()
        self._call("on_train_begin")
        if args.eval_on_start and not first and args.eval_strategy != "no":
            self._measure()
        results = loop.run()
        with TrainingBar(loop.steps, first, self._shows_bar()) as bar:
            while state.global_step < loop.steps and not self.control.should_training_stop:
                if state.epoch_step == 0:
                    self.control.should_epoch_stop = False
                    self._call("on_epoch_begin")
                self._call("on_step_begin")
                result = next(results)
                bar.show(state.global_step, result.loss, result.tokens)
                self._after_step(loop, result, bar.tokens_per_second)
        if args.load_best_model_at_end and state.best_name is not None:
            self._check_best(state)
            self.model.update(read_arrays(self.folder / state.best_name, loop.arrays())["weights"])
        self.model.eval()
        loss, seconds = state.total_loss / max(1, state.global_step), time.perf_counter() - began
        metrics = {
            "train_runtime": seconds,
            "train_steps_per_second": (state.global_step - first) / seconds,
            "train_loss": loss,
        }
        self.log(metrics)
        self._call("on_train_end")
        if args.push_to_hub:
            self.push_to_hub()
        return TrainOutput(state.global_step, loss, metrics)

    def _after_step(self, loop: TrainingLoop, result: StepResult, tokens_per_second: float) -> None:
        """Log, evaluate and save after a step, then after an epoch, where the arguments or a callback ask for it."""
        state, control = self.state, self.control
        self._set_due(loop, "steps")
        control.should_log = control.should_log or (self.args.logging_first_step and state.global_step == 1)
        self._call("on_step_end")
        self._act(loop, result, tokens_per_second)
        if state.epoch_step == 0 or state.global_step == loop.steps or control.should_training_stop:
            self._set_due(loop, "epoch")
            self._call("on_epoch_end")
            self._act(loop, result, tokens_per_second)

    def _set_due(self, loop: TrainingLoop, strategy: str) -> None:
        """Set what the arguments ask for whose strategy is "steps" or "epoch"."""
        args, state, control = self.args, self.state, self.control

        def is_due(chosen: str, every: int) -> bool:
            return chosen == strategy and loop.is_due(chosen, every)

        done = state.epoch if args.eval_strategy == "epoch" else state.global_step
        control.should_log = is_due(args.logging_strategy, args.interval("logging_steps", loop.steps))
        evaluates = is_due(args.eval_strategy, args.interval("eval_steps", loop.steps))
        control.should_evaluate = evaluates and done >= args.eval_delay
        control.should_save = is_due(args.save_strategy, args.interval("save_steps", loop.steps))

    def _act(self, loop: TrainingLoop, result: StepResult, tokens_per_second: float) -> None:
        """Log, evaluate and save, as `control` says."""
        args, state, control = self.args, self.state, self.control
        if control.should_epoch_stop and state.epoch_step:
            raise UserError("A callback ends an epoch early, which is not supported: it can end the training.")
        if control.should_log:
            self._log_training(loop, result, tokens_per_second)
        if control.should_evaluate:
            metric = self._best_metric_of(self._measure())
            if self._is_better(metric, state.best_metric):
                state.best_metric = metric
                control.should_save = control.should_save or args.save_strategy == "best"
            if control.should_save and self._is_better(metric, state.best_checkpoint_metric):
                state.best_checkpoint_metric = metric
                state.best_model_checkpoint = str(self.folder / f"checkpoint-{state.global_step}")
        if control.should_save:
            self._write_checkpoint(loop)
        control.should_log = control.should_evaluate = control.should_save = False

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

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a new model of `model_init`, the same one for the same `args.seed`."""
        assert self.model_init is not None
        mx.random.seed(self.args.seed)
        init: Callable[..., nn.Module] = self.model_init
        return init(trial) if inspect.signature(init).parameters else init()

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Set `optimizer` and `lr_scheduler`."""
        self.optimizer = self.create_optimizer() or self.optimizer
        self.lr_scheduler = self.create_scheduler(num_training_steps, self.optimizer) or self.lr_scheduler

    def create_optimizer(self) -> Any:
        """Return the optimizer: the given one, or that of the arguments. A subclass may override it."""
        optimizer, _ = self._given_optimizers
        return create_optimizer(self.args, self.model.trainable_parameters()) if optimizer is None else optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Callable[[int], Any] | None:
        """Return the schedule: a function from the step, counted from 0, to the learning rate.

        None stands for the schedule of the arguments. A subclass may override it.

        Args:
            num_training_steps: steps of the training.
            optimizer: the optimizer.
        """
        return self._given_optimizers[1]

    def get_train_dataloader(self) -> Iterable[Any]:
        """Return the batches of the current epoch. A subclass may override it, for example with a torch `DataLoader`.

        `train` calls it only if it is overridden, and then once an epoch. Before each batch it seeds `random`, NumPy
        and torch, so that a resumed training gets the same ones.
        """
        data = self.train_dataset
        if not hasattr(data, "__len__"):
            return map(self._collate, grouped(data, self.args.per_device_train_batch_size))
        return Batches(EpochBatches(data, self.args, self._sampler())(self.state.epochs_done), self._reader(data))

    def _get_train_sampler(self, train_dataset: Any = None) -> Iterable[int] | None:
        """Return the indices of the items of an epoch in order. A subclass may override it.

        `random`, NumPy and torch are seeded before. `train` does not call this method itself, which returns None.
        """
        return None

    def _sampler(self) -> Callable[[], Any] | None:
        """Return a function that calls `_get_train_sampler`, with the data if it has an argument; None for our own."""
        if not self._overrides("_get_train_sampler"):
            return None
        sampler: Callable[..., Any] = self._get_train_sampler
        if inspect.signature(sampler).parameters:
            return lambda: sampler(self.train_dataset)
        return sampler

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

    def _start(self, resume: str | os.PathLike[str] | bool | None) -> TrainingLoop:
        """Prepare the model and the output folder, and load the checkpoint to resume from."""
        dataloader = self.get_train_dataloader if self._overrides("get_train_dataloader") else None
        has_items = not hasattr(self.train_dataset, "__len__") or len(self.train_dataset)
        if dataloader is None and (self.train_dataset is None or not has_items):
            raise UserError("There are no training data: give MLXTrainer a train_dataset that is not empty.")
        for part in parts_without_loss(self.model):  # weight decay would shrink these, as no gradient counters it
            part.freeze()
        refuse_quantized(self.model)
        if not tree_flatten(self.model.trainable_parameters()):
            raise UserError("All parameters are frozen: unfreeze some (model.unfreeze()), or add adapters.")
        self._check_evaluations()
        distributed.on_rank_0(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        distributed.on_rank_0(lambda: remove_parts(self.folder))
        mx.random.seed(self.args.seed)
        if self.args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.update(tree_map(lambda x: x.astype(mx.float32), self.model.trainable_parameters()))
        state = self._new_state() if resume or self.args.save_strategy != "no" else TrainerState()
        self.state = state
        own_loss = self._overrides("compute_loss") or self.compute_loss_func is not None
        loop = TrainingLoop(
            self.model,
            self.args,
            self.train_dataset,
            self._collate,
            self._loss,
            state,
            self._arrays,
            dataloader,
            self._sampler(),
            compiles=not own_loss,
        )
        loop.notify = self._call
        self.create_optimizer_and_scheduler(loop.steps)
        loop.optimizer = prepare_optimizer(self.optimizer, self.model.trainable_parameters(), self.args.max_grad_norm)
        self.optimizer, loop.schedule = loop.optimizer, self.lr_scheduler
        if resume:
            loop.resume(self._last_checkpoint() if resume is True else Path(resume))
            if self.args.load_best_model_at_end:
                self._check_best(loop.state)
            self.callbacks.restore(loop.state.callbacks)
        self.state = loop.state
        lines = reversed(loop.state.log_history)
        self._logged_step = next((line["step"] for line in lines if "loss" in line), 0)
        args, state = self.args, self.state
        shown = {"max_steps": loop.steps, "num_train_epochs": args.num_train_epochs}
        shown |= {"logging_steps": args.interval("logging_steps", loop.steps)}
        shown |= {"eval_steps": args.interval("eval_steps", loop.steps)}
        shown |= {"save_steps": args.interval("save_steps", loop.steps)}
        shown |= {
            "train_batch_size": args.per_device_train_batch_size,
            "is_world_process_zero": distributed.is_rank_0(),
        }
        for name, value in shown.items():
            setattr(state, name, value)
        if resume:
            self._rewrite_log()
        return loop

    def _check_evaluations(self) -> None:
        """Raise UserError if an evaluation of the training would lack data, or the metric for the best model."""
        args, data = self.args, self.eval_dataset
        if args.eval_strategy == "no" or self._overrides("get_eval_dataloader") or self._overrides("evaluate"):
            return
        if data is None:
            raise UserError(f"eval_strategy={args.eval_strategy!r} needs data: give MLXTrainer an eval_dataset.")
        chooses = args.load_best_model_at_end or args.save_strategy == "best"
        prefixes = tuple(f"eval_{name}_" for name in data) if isinstance(data, Mapping) else ()
        if chooses and prefixes and not args.best_metric.startswith(prefixes):
            raise UserError(
                f"metric_for_best_model={args.metric_for_best_model!r} must name the evaluation data set, such as "
                f"{prefixes[0]}loss."
            )

    def _overrides(self, name: str) -> bool:
        return getattr(type(self), name) is not getattr(MLXTrainer, name)

    # Callbacks

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

    def _new_state(self) -> TrainerState:
        """Return the state of a new training: its settings and its frozen parameters, which resuming compares."""
        settings = self.args.settings()
        if hasattr(self.model, "config"):
            settings |= config_settings(self.model.config)
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
        parts: Any = [tree_flatten(part.parameters()) for part in parts_without_loss(self.model)]
        ignored = {id(array) for part in parts for _, array in part}
        parameters: Any = tree_flatten(self.model.parameters())
        trained: Any = tree_flatten(self.model.trainable_parameters(), destination={})
        return {name: array for name, array in parameters if name not in trained and id(array) not in ignored}

    def _data_settings(self) -> dict[str, Any]:
        """Return the settings for the data, as far as their items can be compared."""
        sets = {"training data": self.train_dataset}
        if self.args.load_best_model_at_end:
            sets |= {f"validation data {name}".strip(): data for name, data in _named(self.eval_dataset).items()}
        settings: dict[str, Any] = {}
        for name, data in sets.items():
            if hasattr(data, "set_epoch"):
                data.set_epoch(0)
            has_items = data is not None and hasattr(data, "__len__")
            checksum = checksum_of_items(data, self._columns) if has_items else None
            settings[name] = None if checksum is None else content("", checksum)
        return settings

    def _last_checkpoint(self) -> Path:
        found = checkpoints_in(self.folder)
        if not found:
            raise UserError(f"No checkpoint found in {self.folder} to resume from.")
        return found[-1]

    def _check_best(self, state: TrainerState) -> None:
        """Raise UserError if the best checkpoint is damaged."""
        if state.best_name is not None:
            best = self.folder / state.best_name
            check_checkpoint(best, f"{best.name} is the best model so far: restore it, or start again in a new folder.")

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

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Iterable[Any]:
        """Return the batches of an evaluation. A subclass may override it."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        groups = batches_by_rows(range(len(data)), self.args.per_device_eval_batch_size)
        return Batches(groups, self._reader(data))

    def get_test_dataloader(self, test_dataset: Any) -> Iterable[Any]:
        """Return the batches of a prediction. A subclass may override it."""
        groups = batches_by_rows(range(len(test_dataset)), self.args.per_device_eval_batch_size)
        return Batches(groups, self._reader(test_dataset))

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
        began, loss, count, samples = time.perf_counter(), 0.0, 0, 0
        rows: list[dict[str, Any]] = []  # of this rank's batches
        for batch in batches_of_rank(dataloader, self._arrays):
            inputs = to_mlx(batch)
            batch_loss, predictions, labels = self.prediction_step(
                self.model, inputs, bool(prediction_loss_only), ignore_keys
            )
            number, size = label_count(batch, self.label_names), len(next(iter(batch.values())))
            samples += size
            if batch_loss is not None and number:  # the mean loss over no labels is NaN
                loss, count = loss + float(batch_loss) * number, count + number
            if not prediction_loss_only:
                if predictions is not None and self.preprocess_logits_for_metrics is not None:
                    predictions = self.preprocess_logits_for_metrics(predictions, labels)
                row = {"predictions": predictions, "labels": labels}
                if "inputs" in self.args.include_for_metrics:
                    row["inputs"] = inputs[getattr(self.model, "main_input_name", "input_ids")]
                if "loss" in self.args.include_for_metrics and batch_loss is not None:
                    row["losses"] = mx.broadcast_to(batch_loss, (size,))
                rows.append({name: tree_map(_to_numpy, x) for name, x in row.items() if x is not None})
            self._call("on_prediction_step")
        self.model.train(was_training)
        loss, count = self._sum_over_ranks(loss), distributed.all_sum(count)
        found: Any = joined(gather(rows, self.state.global_step)) if not prediction_loss_only else None
        found = found or {}
        metrics: dict[str, Any] = {}
        if count:
            metrics["loss"] = loss / count
        if self.compute_metrics is not None and "labels" in found:
            others = {name: found[name] for name in ("inputs", "losses") if name in found}
            metrics |= self.compute_metrics(EvalPrediction(found.get("predictions"), found["labels"], **others))
        prefix = metric_key_prefix
        metrics = {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": v for name, v in metrics.items()}
        metrics[f"{prefix}_runtime"] = time.perf_counter() - began
        samples = distributed.all_sum(samples)
        return EvalLoopOutput(found.get("predictions"), found.get("labels"), plain_numbers(metrics), samples)

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

    def _measure(self) -> dict[str, float]:
        """Evaluate during a training."""
        return self.evaluate(ignore_keys=self._ignored_outputs) if self._ignored_outputs else self.evaluate()

    def _best_metric_of(self, metrics: Mapping[str, Any]) -> float | None:
        """Return the metric that chooses the best model; None if none was chosen.

        Raises:
            UserError: it is missing, and the best model is to be loaded or saved.
        """
        args = self.args
        if args.metric_for_best_model is None:
            return None
        if args.best_metric not in metrics and (args.load_best_model_at_end or args.save_strategy == "best"):
            raise UserError(
                f"metric_for_best_model={args.metric_for_best_model!r} was not measured. It must be one of "
                f"{', '.join(metrics)}."
            )
        return metrics.get(args.best_metric)

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
        elif hasattr(self.model, "save_pretrained"):
            self.model.save_pretrained(folder)
        else:
            write_safetensors(folder / SAFETENSORS, dict(tree_flatten(self.model.parameters())))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def push_to_hub(self, **kwargs: Any) -> Any:
        """Publish the model, and the tokenizer if there is one, on the Hub; arguments as in `model.push_to_hub`."""
        from mlx_esm_hf.hub import publish

        self.save_model()
        name = self.args.hub_model_id or self.folder.resolve().name
        args = self.args
        settings = {"token": args.hub_token, "private": args.hub_private_repo, "revision": args.hub_revision} | kwargs
        return distributed.on_rank_0(lambda: publish(self.folder, name, **settings))

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

    def save_state(self) -> None:
        """Write the progress to `trainer_state.json` in the output folder."""
        distributed.on_rank_0(lambda: replace_file(self.folder / STATE, self.state.to_json().encode()))

    def is_world_process_zero(self) -> bool:
        """Return whether this is rank 0."""
        return distributed.is_rank_0()

    def is_local_process_zero(self) -> bool:
        """Return whether this is rank 0."""
        return distributed.is_rank_0()

    def num_examples(self, dataloader: Any) -> int:
        """Return the number of items in a data loader of this trainer, or in the `dataset` of another one."""
        return sum(map(len, dataloader.groups)) if isinstance(dataloader, Batches) else len(dataloader.dataset)

    def get_learning_rates(self) -> list[float]:
        """Return the learning rate of the last step, as a list of one."""
        return [float(self.optimizer.learning_rate)]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters with weight decay: all but biases and norms."""
        parameters: Any = tree_flatten(model.parameters())
        return [name for name, _ in parameters if is_decayed(name)]

    def get_num_trainable_parameters(self) -> int:
        """Return the number of elements of the trainable parameters."""
        parameters: Any = tree_flatten(self.model.trainable_parameters())
        return sum(array.size for _, array in parameters)

    def _write_checkpoint(self, loop: TrainingLoop) -> None:
        state = self.state
        if hasattr(self.model, "config"):
            state.settings |= config_settings(self.model.config)
        state.callbacks = self.callbacks.states()
        arrays = None if self.args.save_only_model else loop.arrays()
        distributed.on_rank_0(lambda: write_checkpoint(self.folder, state, arrays, self._write_model))
        distributed.on_rank_0(lambda: rotate(self.folder, self.args.save_total_limit, state.best_name))
        self._call("on_save")

    def _is_better(self, metric: float | None, best: float | None) -> bool:
        """Return whether a metric is better than the best one. One that is not finite never is."""
        if metric is None or not math.isfinite(metric):
            return False
        if best is None:
            return True
        return metric > best if self.args.higher_is_better else metric < best

    def _log_training(self, loop: TrainingLoop, result: StepResult, tokens_per_second: float) -> None:
        state = self.state
        last, self._logged_step = self._logged_step, state.global_step
        entry = {
            "loss": state.loss_since_log / max(1, state.global_step - last),
            "grad_norm": result.grad_norm,
            "learning_rate": loop.learning_rate,
            "tokens": state.tokens,
            "tokens_per_second": tokens_per_second,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }
        if self.args.include_num_input_tokens_seen != "no":
            entry["num_input_tokens_seen"] = state.tokens
        state.loss_since_log = 0.0
        self.log(entry)

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

    def _rewrite_log(self) -> None:
        """Write the log as of the checkpoint, without the lines that came after it."""
        lines = "".join(json.dumps(line) + "\n" for line in self.state.log_history)
        distributed.on_rank_0(lambda: replace_file(self.folder / LOG, lines.encode()))

    def _shows_bar(self) -> bool | None:
        """Return whether to show the progress bar; None means on a terminal only."""
        if not distributed.is_rank_0() or self.args.disable_tqdm:
            return False
        return None if self.args.disable_tqdm is None else True


def refuse_quantized(model: Any) -> None:
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


def parts_without_loss(model: nn.Module) -> list[nn.Module]:
    """Return the parts of a model that receive no gradient, such as the contact head."""
    bases = [m for m in model.modules() if isinstance(m, MLXPreTrainedModel) and m.base_model is m]
    return [module_at(base, name.rstrip(".")) for base in bases for name in base.without_loss]


def _named(datasets: Any) -> dict[str, Any]:
    """Return a dictionary of data sets, or one of a single data set under the name ""."""
    return dict(datasets) if isinstance(datasets, Mapping) else {"": datasets}


def _to_numpy(x: Any) -> np.ndarray:
    return np.array(x.astype(mx.float32) if x.dtype in (mx.bfloat16, mx.float16) else x)
