"""The training loop: batches of each epoch, optimizer steps, and resuming from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_esm_hf import ops
from mlx_esm_hf.errors import NonFiniteLossError, UserError
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.checkpoints import STATE, TrainerState, advice_on, read_arrays, read_state
from mlx_esm_hf.training.datasets import batches_by_rows, batches_by_tokens, shuffled_items
from mlx_esm_hf.training.optimizer import AdamW
from mlx_esm_hf.training.settings import differences

Batch = dict[str, np.ndarray]


class StepResult(NamedTuple):
    """Measurements of one optimizer step, over all ranks.

    Attributes:
        loss: mean over all labels of the step.
        grad_norm: norm of the gradients before clipping.
        tokens: real tokens, without padding.
    """

    loss: float
    grad_norm: float
    tokens: int


class TrainingLoop:
    """Everything that one call of `MLXTrainer.train` needs from step to step.

    Args:
        model: its trainable parameters are in float32.
        args: the settings.
        data: the training data set.
        collate: makes a batch from the data set and the indices of its items.
        compute_loss: returns the mean loss over the labels of a batch.
        state: the progress, which a checkpoint stores: that of a new training, with its settings.

    Attributes:
        steps: optimizer steps in total.
        batches_per_step: batches of one optimizer step on all ranks together.
    """

    def __init__(
        self,
        model: MLXPreTrainedModel,
        args: MLXTrainingArguments,
        data: Any,
        collate: Callable[[Any, np.ndarray], Batch],
        compute_loss: Callable[[Any, dict[str, mx.array]], mx.array],
        state: TrainerState,
    ):
        self.model, self.args, self.data = model, args, data
        self.collate, self.compute_loss, self.state = collate, compute_loss, state
        self.lengths = None if args.batch_tokens is None else token_lengths(data)
        self.batches_per_step = args.gradient_accumulation_steps * distributed.size()
        epoch_steps = self.steps_of(self.batches(0))
        self.steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch_steps)
        self.optimizer = AdamW(
            model.trainable_parameters(),
            args.learning_rate,
            (args.adam_beta1, args.adam_beta2),
            args.adam_epsilon,
            args.weight_decay,
            args.max_grad_norm,
        )

    def run(self) -> Iterator[StepResult]:
        """Train to the last step. After each step, `state` is up to date and the measurements are yielded."""
        self._compile()
        state = self.state
        while state.global_step < self.steps:
            if hasattr(self.data, "set_epoch"):
                self.data.set_epoch(state.epochs_done)
            batches = self.batches(state.epochs_done)
            epoch_steps = self.steps_of(batches)
            for step in range(state.epoch_step, epoch_steps):
                first = step * self.batches_per_step
                result = self.step(batches[first : first + self.batches_per_step])
                state.epoch = state.epochs_done + (step + 1) / epoch_steps
                state.epoch_step = step + 1
                if state.epoch_step == epoch_steps:
                    state.epochs_done, state.epoch_step = state.epochs_done + 1, 0
                yield result
                if state.global_step == self.steps:
                    return

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the item indices of each batch of an epoch.

        Raises:
            UserError: the epoch has no items.
        """
        data, args = self.data, self.args
        items = data.order(args.seed, epoch) if hasattr(data, "order") else shuffled_items(len(data), args.seed, epoch)
        if not len(items):
            raise UserError(f"Epoch {epoch} of the training data has no items: the sampling weights leave none.")
        if self.lengths is None or args.batch_tokens is None:
            return batches_by_rows(items, args.per_device_train_batch_size)
        rng = np.random.default_rng((args.seed, epoch, 1))
        return batches_by_tokens(items, self.lengths, args.batch_tokens, rng)

    def steps_of(self, batches: Sequence[np.ndarray]) -> int:
        """Return the number of optimizer steps of an epoch with these batches."""
        return math.ceil(len(batches) / self.batches_per_step)

    def step(self, items: Sequence[np.ndarray]) -> StepResult:
        """Update the weights once.

        Args:
            items: item indices of each batch of the step. The ranks share the batches.

        Raises:
            NonFiniteLossError: the loss or the norm of the gradients is infinite or NaN.
        """
        batches = [self.collate(self.data, batch) for batch in items[distributed.rank() :: distributed.size()]]
        self.model.train()
        loss, gradients = self._gradients(batches)
        learning_rate = self.args.learning_rate_at(self.state.global_step, self.steps)
        self.optimizer.state["learning_rate"] = mx.array(learning_rate)
        norm: Any = self._update(gradients)
        del gradients  # so that their memory can be reused
        mx.eval(loss, norm, self.model.parameters(), self.optimizer.state, mx.random.state)
        loss, norm = loss.item(), norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLossError(
                f"Step {self.state.global_step + 1}: the loss is {loss}, the norm of the gradients {norm}. The "
                f"batches of this step contain items {np.concatenate(items).tolist()} of the training data. Nothing "
                "was written since the last checkpoint: check these items, or resume from the checkpoint with a lower "
                "learning rate."
            )
        tokens = distributed.all_sum(sum(token_count(batch) for batch in batches))
        self.state.global_step += 1
        self.state.loss_since_log += loss
        self.state.total_loss += loss
        self.state.tokens += tokens
        return StepResult(loss, norm, tokens)

    def is_due(self, strategy: str, every: int | None) -> bool:
        """Return whether an action with this strategy follows the step just done. The last step triggers all but "no".

        Args:
            strategy: "no", "steps" or "epoch".
            every: steps between two actions, for "steps".
        """
        if strategy == "no":
            return False
        if self.state.global_step == self.steps:
            return True
        if strategy == "epoch":
            return self.state.epoch_step == 0
        return self.state.global_step % (every or 1) == 0

    def resume(self, checkpoint: Path) -> None:
        """Load weights, optimizer, random state and progress of a checkpoint.

        Raises:
            UserError: the folder is not a training checkpoint, is damaged, or belongs to a training with other
                settings, parameters or frozen weights.
        """
        state = read_state(checkpoint)
        if changed := differences(state.settings, self.state.settings):
            raise UserError(
                f"{checkpoint} belongs to a training with other settings ({', '.join(changed)}). Resume with the same "
                "settings, or choose another output."
            )
        arrays = read_arrays(checkpoint, self.arrays())
        if state.frozen != self.state.frozen:
            raise UserError(
                f"{checkpoint} belongs to a training with other frozen parameters. Resume with the same model, or "
                "choose another output."
            )
        self._check_progress(state, checkpoint)
        self.state = state
        self.model.update(arrays["weights"])
        self.optimizer.state = arrays["optimizer"]
        high, low = arrays["random"].tolist()
        mx.random.seed(high << 32 | low)  # MLX stores the seed as it is, so this restores the state

    def _check_progress(self, state: TrainerState, checkpoint: Path) -> None:
        """Raise UserError if the progress of a checkpoint is not possible in this training."""

        def check(name: str, limit: int) -> None:
            if getattr(state, name) > limit:
                raise UserError(
                    f"{checkpoint / STATE}: {name} must be at most {limit}, got {getattr(state, name)}. "
                    f"{advice_on(checkpoint)}"
                )

        check("global_step", self.steps)
        check("epochs_done", state.global_step)
        check("epoch_step", min(state.global_step, self.steps_of(self.batches(state.epochs_done)) - 1))

    def arrays(self) -> dict[str, Any]:
        """Return the tree of arrays that a checkpoint stores."""
        return {
            "weights": self.model.trainable_parameters(),
            "optimizer": self.optimizer.state,
            "random": mx.random.state[0],  # type: ignore[index]
        }

    def _compile(self) -> None:
        model, optimizer = self.model.state, self.optimizer.state
        self._loss_and_gradients = ops.compiled(
            nn.value_and_grad(self.model, self._weighted_loss), [model, mx.random.state]
        )
        self._update = ops.compiled(lambda gradients: self.optimizer.update(self.model, gradients), [model, optimizer])

    def _gradients(self, batches: Sequence[Batch]) -> tuple[Any, Any]:
        """Return the loss of a step and its gradients, averaged over the labels of all batches and ranks.

        A batch counts by its number of labels, so the result does not depend on how a step is divided into batches.
        One without labels, whose mean loss is NaN, is not computed. A step without labels has loss 0 and gradients 0.
        """
        batches = [batch for batch in batches if label_count(batch)]
        labels = distributed.all_sum(sum(label_count(batch) for batch in batches))
        loss: Any = mx.array(0.0)
        gradients: Any = None
        for batch in batches:
            weight = mx.array(label_count(batch) * distributed.size() / labels)
            batch_loss, batch_gradients = self._loss_and_gradients(to_mlx(batch), weight)
            loss = loss + batch_loss
            gradients = batch_gradients if gradients is None else tree_map(mx.add, gradients, batch_gradients)
            if len(batches) > 1:
                mx.eval(loss, gradients)
        if gradients is None:
            gradients = tree_map(mx.zeros_like, self.model.trainable_parameters())
        if distributed.size() > 1:
            gradients = distributed.average_gradients(gradients)
            loss = distributed.all_sum_array(loss) / distributed.size()
        return loss, gradients

    def _weighted_loss(self, inputs: dict[str, mx.array], weight: mx.array) -> mx.array:
        """Return the contribution of a batch to the loss of its step."""
        if self.args.bf16:  # the weights stay in float32 and are rounded for the computation only
            weights = self.model.trainable_parameters()
            self.model.update(tree_map(lambda x: x.astype(mx.bfloat16), weights))
            loss = self.compute_loss(self.model, inputs)
            self.model.update(weights)
        else:
            loss = self.compute_loss(self.model, inputs)
        return loss.astype(mx.float32) * weight


def token_lengths(data: Any) -> np.ndarray:
    """Return the number of tokens of each item of a data set, int [items]."""
    lengths = getattr(data, "lengths", None)
    if lengths is None:
        lengths = np.array([len(data[i]["input_ids"]) for i in range(len(data))])
    return lengths


def label_count(batch: Mapping[str, np.ndarray]) -> int:
    """Return the number of labels that take part in the loss of a batch; its rows if it has no column of labels."""
    labels = batch.get("labels")
    if labels is None:
        return len(next(iter(batch.values())))
    if np.issubdtype(labels.dtype, np.floating):  # every number is a label, even −100
        return labels.size
    return int((labels != IGNORE_INDEX).sum())


def token_count(batch: Mapping[str, np.ndarray]) -> int:
    """Return the number of real tokens of a batch, without padding."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].size if mask is None else mask.sum())


def to_mlx(batch: Mapping[str, np.ndarray]) -> dict[str, mx.array]:
    """Return a batch as MLX arrays."""
    return {name: mx.array(value) for name, value in batch.items()}
