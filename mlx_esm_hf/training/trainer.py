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
from mlx.utils import tree_flatten, tree_map
from transformers.trainer_utils import EvalPrediction, TrainOutput

from mlx_esm_hf.checkpoint.resolve import SAFETENSORS
from mlx_esm_hf.checkpoint.write import stale_weights, write_safetensors
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.device import device_name
from mlx_esm_hf.runtime.files import replace_file, replace_files
from mlx_esm_hf.training.adapters import has_adapters, save_adapter
from mlx_esm_hf.training.adapters.model import adapted_layers
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.callbacks import Control
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
from mlx_esm_hf.training.evaluation import Batches
from mlx_esm_hf.training.evaluator import LOG, Evaluator, named_datasets
from mlx_esm_hf.training.loop import StepResult, TrainingLoop
from mlx_esm_hf.training.optimizer import create_optimizer, is_decayed, prepare_optimizer
from mlx_esm_hf.training.progress import TrainingBar
from mlx_esm_hf.training.sampling import EpochBatches, grouped
from mlx_esm_hf.training.settings import checksum_of_arrays, checksum_of_items, config_settings, content
from mlx_esm_hf.training.trainable import frozen_parameters, parts_without_loss, refuse_quantized

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
    "end", "floating_point_ops", "get_batch_samples", "get_cp_size", "get_decay_parameter_names",
    "get_learning_rates", "get_optimizer_cls_and_kwargs", "get_optimizer_group", "get_sp_size",
    "get_total_train_batch_size", "get_tp_size", "hyperparameter_search", "init_hf_repo", "loss_is_scaled_for_ga",
    "metrics_format", "num_examples", "set_initial_training_values", "store_flos", "training_step",
}  # fmt: skip


class MLXTrainer(Evaluator):
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
        if (model is None) == (model_init is None):
            raise UserError("MLXTrainer needs either a model or a model_init.")
        self.args, self.model_init = args or MLXTrainingArguments(), model_init
        super().__init__(
            self.call_model_init() if model is None else model,
            self.args,
            data_collator,
            eval_dataset,
            tokenizer if processing_class is None else processing_class,
            compute_loss_func,
            compute_metrics,
            callbacks,
            preprocess_logits_for_metrics,
        )
        self.train_dataset = train_dataset
        self.settings: dict[str, Any] = {}
        self._given_optimizers = optimizers
        if optimizer_cls_and_kwargs is not None:
            if optimizers[0] is not None:
                raise UserError("Give MLXTrainer either an optimizer or optimizer_cls_and_kwargs.")
            optimizer_class, options = optimizer_cls_and_kwargs
            self._given_optimizers = (optimizer_class(**options), optimizers[1])
        self._ignored_outputs: list[str] | None = None
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

    # Callbacks

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
        frozen = None if "model" in self.settings else checksum_of_arrays(frozen_parameters(self.model))
        return TrainerState(settings=json.loads(json.dumps(settings)), frozen=frozen)

    def _data_settings(self) -> dict[str, Any]:
        """Return the settings for the data, as far as their items can be compared."""
        sets = {"training data": self.train_dataset}
        if self.args.load_best_model_at_end:
            sets |= {
                f"validation data {name}".strip(): data for name, data in named_datasets(self.eval_dataset).items()
            }
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

    # Evaluation

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

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: Any = None,
        dataset_tags: str | list[str] | None = None,
        dataset: Any = None,
        dataset_args: Any = None,
    ) -> None:
        """Save the model, and next to it a model card, `README.md`, which `push_to_hub` publishes.

        Args:
            language: the Hub's name of a language.
            license: the Hub's name of the license, such as "mit".
            tags: additional tags.
            model_name: name of the model; by default the repository of `push_to_hub`.
            finetuned_from: id of the base model; by default the repository that the model was loaded from.
            tasks: ignored. The card has the task of the model's head.
            dataset_tags: ids of data sets on the Hub.
            dataset: ignored, as the card has no table of results.
            dataset_args: ignored, like `dataset`.

        Raises:
            UserError: the model has adapters.
        """
        from mlx_esm_hf.hub.card import write_card
        from mlx_esm_hf.hub.files import CARD, TOKENIZER, read_checkpoint
        from mlx_esm_hf.hub.publish import hub_id

        if has_adapters(self.model):
            raise UserError("A model card describes a whole model: merge the adapters first (merge_adapters).")
        self.save_model()

        def write() -> None:
            checkpoint = read_checkpoint(self.folder)
            card: Any = write_card(
                checkpoint,
                model_name or self.args.hub_model_id or self.folder.resolve().name,
                tokenizer=any(name in TOKENIZER for name in checkpoint.files),
                base_model=finetuned_from or hub_id(getattr(self.model, "name_or_path", None)),
                license=license,
                tags=["generated_from_trainer", *_listed(tags)],
            )
            card.data.language, card.data.datasets = _listed(language) or None, _listed(dataset_tags) or None
            replace_file(self.folder / CARD, str(card).encode())

        distributed.on_rank_0(write)

    def save_state(self) -> None:
        """Write the progress to `trainer_state.json` in the output folder."""
        distributed.on_rank_0(lambda: replace_file(self.folder / STATE, self.state.to_json().encode()))

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

    def _rewrite_log(self) -> None:
        """Write the log as of the checkpoint, without the lines that came after it."""
        lines = "".join(json.dumps(line) + "\n" for line in self.state.log_history)
        distributed.on_rank_0(lambda: replace_file(self.folder / LOG, lines.encode()))

    def _shows_bar(self) -> bool | None:
        """Return whether to show the progress bar; None means on a terminal only."""
        if not distributed.is_rank_0() or self.args.disable_tqdm:
            return False
        return None if self.args.disable_tqdm is None else True


def _listed(value: str | list[str] | None) -> list[str]:
    """Return a string as a list, a list as it is, and None as an empty list."""
    return [value] if isinstance(value, str) else value or []
