"""Settings of a training, named as in transformers' `TrainingArguments`."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from mlx_esm_hf.checks import MOST, MOST_SEED, check_choice, check_choices, check_integer, check_number
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.device import device_name
from mlx_esm_hf.training.argument_groups import NEWER, IgnoredArguments, OlderArguments, RefusedArguments
from mlx_esm_hf.training.optimizer_names import kind_of, options_of
from mlx_esm_hf.training.reporting import trackers
from mlx_esm_hf.training.schedules import SCHEDULES, schedule

STRATEGIES = ("no", "steps", "epoch")
SAMPLING = ("random", "sequential", "group_by_length")


class ParallelMode(Enum):
    """How the processes of a training share its work, as in transformers."""

    NOT_PARALLEL = "not_parallel"
    DISTRIBUTED = "distributed"


@dataclass
class MLXTrainingArguments(IgnoredArguments, RefusedArguments, OlderArguments):
    """Settings of `MLXTrainer`, with the names, defaults and meaning of transformers' `TrainingArguments`.

    All arguments of transformers are known. Those listed here are implemented. Those of `IgnoredArguments` have no
    effect on MLX. Those of `RefusedArguments` raise an error that says what to do instead. Older names, such as
    `evaluation_strategy`, work with a warning. `transformers.HfArgumentParser` accepts this class.

    Args:
        output_dir: folder for the `checkpoint-<step>` folders and `log.jsonl`.
        per_device_train_batch_size: items per training batch on each rank.
        per_device_eval_batch_size: items per evaluation batch on each rank.
        batch_tokens: tokens per training batch, padding included, instead of a number of items; items of similar length
            share a batch. transformers has no such argument.
        gradient_accumulation_steps: batches per optimizer step on each rank.
        num_train_epochs: number of epochs; may be a fraction.
        max_steps: number of optimizer steps; −1 means as many as the epochs have.
        learning_rate: the peak of the schedule.
        lr_scheduler_type: "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
            "inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr" or "warmup_stable_decay".
        lr_scheduler_kwargs: options of the schedule, such as {"num_cycles": 2}; also as JSON text.
        warmup_steps: steps over which the learning rate rises; below 1, the fraction of all steps.
        warmup_ratio: this fraction under its older name.
        optim: the optimizer. "adamw_torch" and "adamw_torch_fused" are AdamW; "sgd", "adagrad", "rmsprop", "adafactor"
            and "lion_32bit" are those of `mlx.optimizers`. 8-bit and paged variants are computed in 32 bits.
        optim_args: options of the optimizer, such as "momentum=0.9,nesterov=true".
        weight_decay: weight decay of the optimizer, for all parameters except biases and norms.
        adam_beta1, adam_beta2, adam_epsilon: parameters of AdamW, which corrects the bias of the moments. Lion uses
            the betas.
        max_grad_norm: gradients are clipped to this norm; 0 turns clipping off.
        label_smoothing_factor: mixes this fraction of a uniform distribution into the labels.
        activation_checkpointing: recompute each layer in the backward pass instead of keeping its intermediates.
        gradient_checkpointing: the same under its older name.
        bf16: compute in bfloat16 with weights kept in float32.
        fp16: the same, with a warning: MLX trains in bfloat16, which needs no loss scaling.
        eval_strategy: when to evaluate: "no", "steps" or "epoch".
        eval_steps: steps between evaluations, or the fraction of all steps; by default `logging_steps`.
        eval_delay: epochs or steps, as `eval_strategy` says, before the first evaluation.
        eval_on_start: evaluate before the first step as well.
        prediction_loss_only: evaluate the loss alone.
        include_for_metrics: what `compute_metrics` gets besides predictions and labels: "inputs", "loss".
        save_strategy: when to write a checkpoint: "no", "steps", "epoch", or "best" after each evaluation that
            improves the best metric.
        save_steps: steps between checkpoints, or the fraction of all steps.
        save_total_limit: number of checkpoints to keep; the last and the best one are always kept.
        save_only_model: write checkpoints without what resuming needs.
        logging_strategy: when to log the training loss: "no", "steps" or "epoch".
        logging_steps: steps between log lines, or the fraction of all steps.
        logging_first_step: log the first step as well.
        include_num_input_tokens_seen: add the number of real tokens to the log: "no", "all" (True) or "non_padding",
            which both leave out padding.
        load_best_model_at_end: load the weights of the best checkpoint at the end.
        metric_for_best_model: the metric that chooses it; by default "eval_loss".
        greater_is_better: whether a larger metric is better; by default yes, except for a loss or an error.
        seed: seed of shuffling, masking and dropout.
        data_seed: seed of shuffling; by default `seed`.
        dataloader_drop_last: leave out the last batch of an epoch if it is not full.
        train_sampling_strategy: order of the items: "random", "sequential" or "group_by_length".
        length_column_name: the column with the lengths of the items, for "group_by_length".
        remove_unused_columns: drop the columns that the model does not accept.
        label_names: the columns with labels; by default "labels".
        disable_tqdm: hide the progress bar; None shows it on a terminal only.
        report_to: trackers that receive the log: "tensorboard", "wandb", "trackio", a list of them, "all" that are
            installed, or "none". `log.jsonl` is always written.
        run_name: name of the run in the trackers.
        project: project of the run in trackio.
        trackio_space_id, trackio_bucket_id, trackio_static_space_id: where trackio publishes its dashboard.
        logging_dir: folder for the files of TensorBoard; by default `runs` in the output folder.
        push_to_hub: publish the model at the end.
        hub_model_id: the repository to publish to.
        hub_token: the token to publish with; by default the one of `hf auth login`.
        hub_private_repo: whether a new repository is private.
        hub_revision: the branch to publish to.
        hub_strategy: "end" or "every_save", which both publish at the end.

    Raises:
        ValueError: a setting is invalid, is not supported, or contradicts another one.
    """

    # HfArgumentParser makes a path of the value because Path is the second type.
    output_dir: str | Path | os.PathLike[str] = "trainer_output"
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    batch_tokens: int | None = None
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_steps: int = -1
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] | str | None = None
    warmup_steps: float = 0
    warmup_ratio: float = 0.0
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    label_smoothing_factor: float = 0.0
    activation_checkpointing: bool | None = None
    gradient_checkpointing: bool = False
    bf16: bool = False
    fp16: bool = False
    eval_strategy: str = "no"
    eval_steps: float | None = None
    eval_delay: float = 0
    eval_on_start: bool = False
    prediction_loss_only: bool = False
    include_for_metrics: list[str] = field(default_factory=list)
    save_strategy: str = "steps"
    save_steps: float = 500
    save_total_limit: int | None = None
    save_only_model: bool = False
    logging_strategy: str = "steps"
    logging_steps: float = 500
    logging_first_step: bool = False
    include_num_input_tokens_seen: str | bool = "no"
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    seed: int = 42
    data_seed: int | None = None
    dataloader_drop_last: bool = False
    train_sampling_strategy: str = "random"
    length_column_name: str = "length"
    remove_unused_columns: bool = True
    label_names: list[str] | None = None
    disable_tqdm: bool | None = None
    report_to: None | str | list[str] = "none"
    run_name: str | None = None
    project: str = "huggingface"
    trackio_space_id: str | None = None
    trackio_bucket_id: str | None = None
    trackio_static_space_id: str | None | Literal[False] = None
    logging_dir: str | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_token: str | None = field(default=None, repr=False)
    hub_private_repo: bool | None = None
    hub_revision: str | None = None
    hub_strategy: str = "every_save"

    def __post_init__(self) -> None:
        for argument in fields(self):
            if isinstance(value := getattr(self, argument.name), Enum):  # such as transformers' SchedulerType
                setattr(self, argument.name, value.value)
        self._refuse()
        self._rename()
        self._normalize()
        self._check()

    def _refuse(self) -> None:
        """Raise if an argument that is not supported is set."""
        for argument in fields(RefusedArguments):
            value = getattr(self, argument.name)
            if value != argument.default and (value or argument.default):
                raise UserError(f"{argument.name}={value!r} is not supported. {argument.metadata['help']}")

    def _rename(self) -> None:
        """Move the values of arguments under older names to the newer ones."""
        defaults = {argument.name: argument.default for argument in fields(self)}
        for name, (newer, meaning) in NEWER.items():
            given = getattr(self, name)
            if given == defaults[name]:
                continue
            value = given if meaning is None else meaning
            shown = "…" if newer == "hub_token" else repr(value)
            warnings.warn(f"{name} is an older name: use {newer}={shown}.", FutureWarning, stacklevel=4)
            if getattr(self, newer) not in (defaults[newer], [], value):
                raise UserError(f"{name} and {newer} set the same thing: give only {newer}.")
            setattr(self, newer, value)
            setattr(self, name, defaults[name])

    def _normalize(self) -> None:
        """Give each argument one form."""
        self.output_dir = os.path.expanduser(self.output_dir or "trainer_output")
        if self.fp16 and self.bf16:
            raise UserError("fp16 and bf16 set the same thing: give only bf16.")
        if self.fp16:
            warnings.warn("fp16=True trains in bfloat16, which needs no loss scaling: use bf16.", stacklevel=4)
            self.fp16, self.bf16 = False, True
        if self.optim.endswith(("8bit", "4bit")):
            warnings.warn(f"optim={self.optim!r} keeps its moments in 32 bits on MLX.", stacklevel=4)
        if self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        self.gradient_checkpointing = self.activation_checkpointing
        if isinstance(self.lr_scheduler_kwargs, str):
            try:
                self.lr_scheduler_kwargs = dict(json.loads(self.lr_scheduler_kwargs))
            except (ValueError, TypeError):
                raise UserError(
                    f"lr_scheduler_kwargs must be a JSON object, got {self.lr_scheduler_kwargs!r}."
                ) from None
        if isinstance(self.include_num_input_tokens_seen, bool):
            self.include_num_input_tokens_seen = "all" if self.include_num_input_tokens_seen else "no"
        self.report_to = trackers(self.report_to)
        self.do_eval = self.do_eval or self.eval_strategy != "no"
        if self.eval_strategy == "steps" and not self.eval_steps:
            self.eval_steps = self.logging_steps
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = self.higher_is_better

    def _check(self) -> None:
        """Raise if a value is invalid."""
        check_choice("eval_strategy", self.eval_strategy, STRATEGIES)
        check_choice("logging_strategy", self.logging_strategy, STRATEGIES)
        check_choice("save_strategy", self.save_strategy, (*STRATEGIES, "best"))
        check_choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        check_choice("train_sampling_strategy", self.train_sampling_strategy, SAMPLING)
        check_choice("include_num_input_tokens_seen", self.include_num_input_tokens_seen, ("no", "all", "non_padding"))
        check_choice("hub_strategy", self.hub_strategy, ("end", "every_save"))
        if self.include_for_metrics:
            check_choices("include_for_metrics", self.include_for_metrics, ("inputs", "loss"))
        if self.warmup_steps and self.warmup_ratio:
            raise UserError("warmup_steps and warmup_ratio set the same thing: give only one of them.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            check_integer(name, getattr(self, name), 1)
        for name in ("batch_tokens", "save_total_limit"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        for name in ("save_steps", "logging_steps", "eval_steps"):
            self._check_interval(name)
        if self.max_steps != -1:
            check_integer("max_steps", self.max_steps, 1)
        check_integer("seed", self.seed, 0, MOST_SEED)
        if self.data_seed is not None:
            check_integer("data_seed", self.data_seed, 0, MOST_SEED)
        check_number("num_train_epochs", self.num_train_epochs, above=0, high=MOST)
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "eval_delay"):
            check_number(name, getattr(self, name), 0)
        check_number("warmup_steps", self.warmup_steps, 0, MOST)
        for name in ("warmup_ratio", "label_smoothing_factor"):
            check_number(name, getattr(self, name), 0, 1)
        for name in ("adam_beta1", "adam_beta2"):
            check_number(name, getattr(self, name), 0, below=1)
        options_of(kind_of(self.optim), self.optim_args)
        self.learning_rate_at(0, 1)
        self._check_only_model()
        if self.load_best_model_at_end:
            self._check_best()

    def _check_interval(self, name: str) -> None:
        """Raise if a number of steps is neither a fraction below 1 nor an integer."""
        value = getattr(self, name)
        if value is None or (isinstance(value, float) and 0 < value < 1):
            return
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        check_integer(name, value, 1)
        setattr(self, name, value)

    def _check_only_model(self) -> None:
        """Raise if a checkpoint without the trained weights would have to be loaded."""
        if self.save_only_model and self.load_best_model_at_end:
            raise UserError("load_best_model_at_end needs whole checkpoints: leave out save_only_model.")

    def _check_best(self) -> None:
        """Raise if a checkpoint would be written without an evaluation at the same step."""
        if self.save_strategy == "best" and self.eval_strategy != "no":
            return
        same = self.eval_strategy == self.save_strategy != "no"
        if not same or (self.eval_strategy == "steps" and not _is_multiple(self.save_steps, self.eval_steps or 1)):
            raise UserError(
                "load_best_model_at_end needs an evaluation at each checkpoint: set eval_strategy and save_strategy to "
                "the same value, and save_steps to a multiple of eval_steps."
            )

    def settings(self) -> dict[str, Any]:
        """Return the arguments that determine the result of a training, under their names; None where one is unused.

        Evaluation and checkpoint arguments are included only if they choose the best model.
        """
        names = ["gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "weight_decay", "adam_beta1"]
        names += ["adam_beta2", "adam_epsilon", "max_grad_norm", "gradient_checkpointing", "bf16", "seed"]
        names += ["batch_tokens", "load_best_model_at_end", "lr_scheduler_kwargs", "optim_args", "data_seed"]
        names += ["label_names"]
        best = self.load_best_model_at_end
        best_of_steps = best and self.eval_strategy == "steps"
        used = {
            "per_device_train_batch_size": self.batch_tokens is None,
            "num_train_epochs": self.max_steps <= 0,
            "max_steps": self.max_steps > 0,
            "eval_strategy": best,
            "per_device_eval_batch_size": best,
            "eval_steps": best_of_steps,
            "save_steps": best_of_steps and self.save_strategy == "steps",
            "eval_delay": best and self.eval_delay > 0,
            "label_smoothing_factor": self.label_smoothing_factor > 0,
            "dataloader_drop_last": self.dataloader_drop_last,
            "train_sampling_strategy": self.train_sampling_strategy != "random",
            "length_column_name": self.train_sampling_strategy == "group_by_length",
            "remove_unused_columns": not self.remove_unused_columns,
        }
        return {
            **{name: getattr(self, name) for name in names},
            **{name: getattr(self, name) if is_used else None for name, is_used in used.items()},
            "optim": None if kind_of(self.optim) == "adamw" else kind_of(self.optim),
            "save_strategy": "best" if best and self.save_strategy == "best" else None,
            "warmup_steps": None if self.lr_scheduler_type == "constant" else self.warmup_steps or self.warmup_ratio,
            "metric_for_best_model": self.best_metric if best else None,
            "greater_is_better": self.higher_is_better if best else None,
        }

    # Numbers that depend on the steps of the training

    def get_warmup_steps(self, steps: int) -> int:
        """Return the number of warm-up steps of a training of `steps` steps."""
        wanted = self.warmup_steps or self.warmup_ratio
        return int(wanted) if wanted >= 1 else math.ceil(wanted * steps)

    def interval(self, name: str, steps: int) -> int:
        """Return the steps between two actions of a training of `steps` steps.

        Args:
            name: "logging_steps", "eval_steps" or "save_steps".
            steps: steps of the training.
        """
        wanted = getattr(self, name) or self.logging_steps
        return math.ceil(wanted * steps) if wanted < 1 else int(wanted)

    def learning_rate_factor(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0, of a training of `steps` steps, divided by the peak.

        Source: the schedules of transformers, `transformers.optimization`.
        """
        options: Any = self.lr_scheduler_kwargs or {}
        factor = schedule(self.lr_scheduler_type, self.learning_rate, self.get_warmup_steps(steps), steps, **options)
        return factor(step)

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0, of a training of `steps` steps."""
        return self.learning_rate * self.learning_rate_factor(step, steps)

    # The best model

    @property
    def best_metric(self) -> str:
        """Name, in the log, of the metric that chooses the best model."""
        name = self.metric_for_best_model or "loss"
        return name if name.startswith("eval_") else f"eval_{name}"

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger `best_metric` is better. Unlike in transformers, a smaller error is better by default."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not self.best_metric.endswith(("loss", "_error"))  # such as root_mean_squared_error

    # What scripts ask for: batches and processes

    @property
    def train_batch_size(self) -> int:
        """Items per training batch of this process."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Items per evaluation batch of this process."""
        return self.per_device_eval_batch_size

    @property
    def device(self) -> mx.Device:
        """MLX's default device."""
        return mx.default_device()

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: 0 or 1."""
        return int(device_name() == "gpu")

    @property
    def parallel_mode(self) -> ParallelMode:
        """Whether the training is shared among ranks."""
        return ParallelMode.DISTRIBUTED if distributed.size() > 1 else ParallelMode.NOT_PARALLEL

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return distributed.size()

    @property
    def process_index(self) -> int:
        """Rank of this process."""
        return distributed.rank()

    @property
    def local_process_index(self) -> int:
        """Rank of this process. Ranks on several machines are numbered together."""
        return distributed.rank()

    @property
    def should_log(self) -> bool:
        """Whether this process writes the log."""
        return distributed.is_rank_0()

    @property
    def should_save(self) -> bool:
        """Whether this process writes checkpoints."""
        return distributed.is_rank_0()

    def get_process_log_level(self) -> int:
        """Return the level for the loggers of a script: `log_level` on rank 0, `log_level_replica` on the others."""
        from transformers.utils import logging

        name = self.log_level if self.should_log else self.log_level_replica
        levels = logging.get_log_levels_dict()
        return logging.get_verbosity() if name == "passive" else levels[name]

    @contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Run the block on rank 0, then on the others, which find what rank 0 has written.

        Args:
            local: not used: ranks on several machines are numbered together.
            desc: not used.
        """
        if not distributed.is_rank_0():
            distributed.all_sum(0)  # waits for rank 0
        try:
            yield
        finally:
            if distributed.is_rank_0():
                distributed.all_sum(0)

    # As dictionaries

    def to_dict(self) -> dict[str, Any]:
        """Return {argument: value}, without older names and with tokens hidden."""
        values = {argument.name: getattr(self, argument.name) for argument in fields(self)}
        return {
            name: f"<{name.upper()}>" if name.endswith("_token") else value
            for name, value in values.items()
            if name not in NEWER
        }

    def to_json_string(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Return `to_dict` with values other than numbers and text as text, for trackers."""
        plain = (bool, int, float, str)
        return {name: value if type(value) in plain else str(value) for name, value in self.to_dict().items()}


def _is_multiple(value: float, unit: float) -> bool:
    """Return whether a number of steps, or fraction of them, is a multiple of another one of its kind."""
    if (value < 1) != (unit < 1):
        return False
    ratio = value / unit
    return abs(ratio - round(ratio)) < 1e-6 and ratio > 0.5
