"""The settings of a training, under the names that transformers' `TrainingArguments` has for them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from mlx_esm_hf.errors import UserError

STRATEGIES = ("no", "steps", "epoch")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclass
class MLXTrainingArguments:
    """What `MLXTrainer` is told. Names, defaults and meaning are those of transformers' `TrainingArguments`. An
    argument that is not here is a TypeError, since ignoring it would train something else.

    Args:
        output_dir: gets `checkpoint-<step>` folders and `log.jsonl`.
        per_device_train_batch_size, per_device_eval_batch_size: items to a batch on each rank.
        batch_tokens: not of transformers: tokens to a training batch instead of items, of like lengths.
        gradient_accumulation_steps: batches to an optimiser step.
        num_train_epochs: may be a fraction.
        max_steps: optimiser steps; −1, as many as the epochs have.
        learning_rate: at the top of the schedule.
        lr_scheduler_type: "linear", "cosine", "constant" or "constant_with_warmup".
        warmup_steps: steps over which the learning rate rises; below 1, the share of all steps.
        warmup_ratio: that share under its older name.
        weight_decay: AdamW's, for all parameters but biases and those of layer norms.
        adam_beta1, adam_beta2, adam_epsilon: of AdamW, with bias correction.
        max_grad_norm: gradients are scaled down to this norm; 0, never.
        gradient_checkpointing: compute each layer again in the backward pass instead of keeping its inside in memory.
        bf16: compute in bfloat16, from weights that are kept in float32.
        eval_strategy, eval_steps: when to evaluate: "no", "steps" or "epoch".
        save_strategy, save_steps: when to write a checkpoint, alike.
        save_total_limit: checkpoints that are kept; the best one is kept beside the last.
        logging_steps: steps between lines of the log.
        load_best_model_at_end, metric_for_best_model, greater_is_better: which checkpoint is the best one, and whether
            its weights are taken at the end. By default that of the least "eval_loss".
        seed: of shuffling, masking and dropout.
        disable_tqdm: show no progress bar. None: show one on a terminal.
        report_to: "none". The log is a file.
        push_to_hub, hub_model_id: publish the model at the end, under this id.

    Raises:
        ValueError: a setting that means nothing, or two that contradict each other.
    """

    output_dir: str | os.PathLike[str] = "trainer_output"
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    batch_tokens: int | None = None
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_steps: int = -1
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    bf16: bool = False
    eval_strategy: str = "no"
    eval_steps: int | None = None
    save_strategy: str = "steps"
    save_steps: int = 500
    save_total_limit: int | None = None
    logging_steps: int = 500
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    seed: int = 42
    disable_tqdm: bool | None = None
    report_to: str = "none"
    push_to_hub: bool = False
    hub_model_id: str | None = None

    def __post_init__(self) -> None:
        for name in ("eval_strategy", "save_strategy"):
            if getattr(self, name) not in STRATEGIES:
                raise UserError(f"{name}={getattr(self, name)!r} is not one of {', '.join(STRATEGIES)}.")
        if self.lr_scheduler_type not in SCHEDULES:
            raise UserError(f"lr_scheduler_type={self.lr_scheduler_type!r} is not one of {', '.join(SCHEDULES)}.")
        if self.report_to != "none":
            raise UserError(
                f"report_to={self.report_to!r}: what is measured goes to {self.output_dir}/log.jsonl, and to nowhere "
                "else. Leave this argument out, or say 'none'."
            )
        if self.warmup_steps and self.warmup_ratio:
            raise UserError("warmup_steps and warmup_ratio are two names for one thing: give one of them.")
        counts = ["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"]
        counts += ["save_steps", "logging_steps"]
        counts += [
            name for name in ("batch_tokens", "eval_steps", "save_total_limit") if getattr(self, name) is not None
        ]
        for name in counts:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: a whole number, 1 at least, is needed.")
        for name in ("learning_rate", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)}: a number that is not negative is needed.")
        if self.eval_steps is None:
            self.eval_steps = self.logging_steps
        if self.load_best_model_at_end:
            self._check_best()

    def _check_best(self) -> None:
        """A best model is one that was evaluated, and saved then."""
        together = self.eval_strategy == self.save_strategy != "no"
        if not together or (self.eval_strategy == "steps" and self.save_steps % (self.eval_steps or 1)):
            raise UserError(
                "load_best_model_at_end needs each checkpoint to be evaluated: set eval_strategy and save_strategy "
                "alike, and save_steps to a multiple of eval_steps."
            )

    @property
    def best_metric(self) -> str:
        """Its name, as it is in the log."""
        name = self.metric_for_best_model or "loss"
        return name if name.startswith("eval_") else f"eval_{name}"

    @property
    def more_is_better(self) -> bool:
        """What `greater_is_better` says; by default more, unless it is a loss or (unlike in transformers) an error."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not self.best_metric.endswith(("loss", "_error"))  # such as root_mean_squared_error

    def warmup(self, steps: int) -> int:
        """Steps, of so many, over which the learning rate rises."""
        wanted = self.warmup_steps or self.warmup_ratio
        return int(wanted) if wanted >= 1 else math.ceil(wanted * steps)

    def learning_rate_at(self, step: int, steps: int) -> float:
        """That of an optimiser step, counted from 0, of so many; as transformers' schedules have it."""
        warmup = 0 if self.lr_scheduler_type == "constant" else self.warmup(steps)
        if step < warmup:
            return self.learning_rate * step / warmup
        left = (steps - step) / max(1, steps - warmup)
        if self.lr_scheduler_type == "linear":
            return self.learning_rate * max(0.0, left)
        if self.lr_scheduler_type == "cosine":
            return self.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * (1 - left))))
        return self.learning_rate
