"""Settings of a training, named as in transformers' `TrainingArguments`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from mlx_esm_hf.checks import MOST, MOST_SEED, check_choice, check_integer, check_number
from mlx_esm_hf.errors import UserError

STRATEGIES = ("no", "steps", "epoch")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclass
class MLXTrainingArguments:
    """Settings of `MLXTrainer`, with the names, defaults and meaning of transformers' `TrainingArguments`.

    An argument that is not listed here raises a TypeError, since ignoring it would change the training.

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
        lr_scheduler_type: "linear", "cosine", "constant" or "constant_with_warmup".
        warmup_steps: steps over which the learning rate rises; below 1, the fraction of all steps.
        warmup_ratio: this fraction under its older name.
        weight_decay: weight decay of AdamW, for all parameters except biases and norms.
        adam_beta1, adam_beta2, adam_epsilon: parameters of AdamW, which corrects the bias of the moments.
        max_grad_norm: gradients are clipped to this norm; 0 turns clipping off.
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping its intermediates.
        bf16: compute in bfloat16 with weights kept in float32.
        eval_strategy: when to evaluate: "no", "steps" or "epoch".
        eval_steps: steps between evaluations; by default `logging_steps`.
        save_strategy: when to write a checkpoint: "no", "steps" or "epoch".
        save_steps: steps between checkpoints.
        save_total_limit: number of checkpoints to keep; the last and the best one are always kept.
        logging_steps: steps between log lines.
        load_best_model_at_end: load the weights of the best checkpoint at the end.
        metric_for_best_model: the metric that chooses it; by default "eval_loss".
        greater_is_better: whether a larger metric is better; by default yes, except for a loss or an error.
        seed: seed of shuffling, masking and dropout.
        disable_tqdm: hide the progress bar; None shows it on a terminal only.
        report_to: must be "none". The log is a file.
        push_to_hub: publish the model at the end.
        hub_model_id: the repository to publish to.

    Raises:
        ValueError: a setting is invalid, or two settings contradict each other.
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
            check_choice(name, getattr(self, name), STRATEGIES)
        check_choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        if self.report_to != "none":
            raise UserError(
                f"report_to must be 'none', got {self.report_to!r}: measurements are written to "
                f"{self.output_dir}/log.jsonl only."
            )
        if self.warmup_steps and self.warmup_ratio:
            raise UserError("warmup_steps and warmup_ratio set the same thing: give only one of them.")
        counts = ["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"]
        counts += ["save_steps", "logging_steps"]
        counts += [
            name for name in ("batch_tokens", "eval_steps", "save_total_limit") if getattr(self, name) is not None
        ]
        for name in counts:
            check_integer(name, getattr(self, name), 1)
        if self.max_steps != -1:
            check_integer("max_steps", self.max_steps, 1)
        check_integer("seed", self.seed, 0, MOST_SEED)
        check_number("num_train_epochs", self.num_train_epochs, above=0, high=MOST)
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            check_number(name, getattr(self, name), 0)
        check_number("warmup_steps", self.warmup_steps, 0, MOST)
        check_number("warmup_ratio", self.warmup_ratio, 0, 1)
        for name in ("adam_beta1", "adam_beta2"):
            check_number(name, getattr(self, name), 0, below=1)
        check_number("adam_epsilon", self.adam_epsilon, 0)
        if self.eval_steps is None:
            self.eval_steps = self.logging_steps
        if self.load_best_model_at_end:
            self._check_best()

    def _check_best(self) -> None:
        """Raise if a checkpoint would be written without an evaluation at the same step."""
        same = self.eval_strategy == self.save_strategy != "no"
        if not same or (self.eval_strategy == "steps" and self.save_steps % (self.eval_steps or 1)):
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
        names += ["batch_tokens", "load_best_model_at_end"]
        best = self.load_best_model_at_end
        best_of_steps = best and self.eval_strategy == "steps"
        used = {
            "per_device_train_batch_size": self.batch_tokens is None,
            "num_train_epochs": self.max_steps <= 0,
            "max_steps": self.max_steps > 0,
            "eval_strategy": best,
            "per_device_eval_batch_size": best,
            "eval_steps": best_of_steps,
            "save_steps": best_of_steps,
        }
        return {
            **{name: getattr(self, name) for name in names},
            **{name: getattr(self, name) if is_used else None for name, is_used in used.items()},
            "warmup_steps": None if self.lr_scheduler_type == "constant" else self.warmup_steps or self.warmup_ratio,
            "metric_for_best_model": self.best_metric if best else None,
            "greater_is_better": self.higher_is_better if best else None,
        }

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

    def get_warmup_steps(self, steps: int) -> int:
        """Return the number of warm-up steps of a training of `steps` steps."""
        wanted = self.warmup_steps or self.warmup_ratio
        return int(wanted) if wanted >= 1 else math.ceil(wanted * steps)

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0, of a training of `steps` steps.

        Source: the schedules of transformers, `transformers.optimization`.
        """
        warmup = 0 if self.lr_scheduler_type == "constant" else self.get_warmup_steps(steps)
        if step < warmup:
            return self.learning_rate * step / warmup
        left = (steps - step) / max(1, steps - warmup)
        if self.lr_scheduler_type == "linear":
            return self.learning_rate * max(0.0, left)
        if self.lr_scheduler_type == "cosine":
            return self.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * (1 - left))))
        return self.learning_rate
