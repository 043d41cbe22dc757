"""The training loop: batches of each epoch, optimizer steps, and resuming from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_esm_hf import ops
from mlx_esm_hf.errors import NonFiniteLossError, UserError
from mlx_esm_hf.modeling_inputs import IGNORE_INDEX
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.seeds import seed_libraries
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.checkpoints import STATE, TrainerState, advice_on, read_arrays, read_state
from mlx_esm_hf.training.evaluation import Batch
from mlx_esm_hf.training.optimizer import create_optimizer
from mlx_esm_hf.training.sampling import EpochBatches, batches_per_step, grouped, seeded, shuffling_seed
from mlx_esm_hf.training.settings import differences


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
        collate: makes a batch from the items of a data set.
        compute_loss: returns the mean loss over the labels of a batch.
        state: the progress, which a checkpoint stores: that of a new training, with its settings.
        to_arrays: makes NumPy arrays of a batch that it did not collate.
        dataloader: returns the batches of an epoch, instead of those made from `data`.
        sampler: returns the indices of the items of an epoch in order, instead of a shuffled order.
        compiles: whether a GPU may compile `compute_loss`, which then cannot read numbers that change.

    Attributes:
        steps: optimizer steps in total.
        batches_per_step: batches of one optimizer step on all ranks together.
        optimizer: the optimizer; by default that of the arguments.
        schedule: returns the learning rate of a step, counted from 0; None for that of the arguments.
        learning_rate: the learning rate of the last step.
        notify: is called with the name of each event within a step, such as "on_optimizer_step".

    Raises:
        UserError: the number of steps is unknown, because `max_steps` is not set and the data have no length.
    """

    def __init__(
        self,
        model: nn.Module,
        args: MLXTrainingArguments,
        data: Any,
        collate: Callable[[Sequence[Any]], Batch],
        compute_loss: Callable[[Any, dict[str, mx.array]], mx.array],
        state: TrainerState,
        to_arrays: Callable[[Any], Batch],
        dataloader: Callable[[], Iterable[Any]] | None = None,
        sampler: Callable[[], Iterable[int]] | None = None,
        compiles: bool = True,
    ):
        self.model, self.args, self.data = model, args, data
        self.collate, self.compute_loss, self.state = collate, compute_loss, state
        self.to_arrays, self.dataloader, self.compiles = to_arrays, dataloader, compiles
        self.batches_per_step = batches_per_step(args)
        has_items = dataloader is None and hasattr(data, "__len__")
        self.batches = EpochBatches(data, args, sampler) if has_items else None
        self.steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self._epoch_steps())
        self.optimizer: Any = create_optimizer(args, model.trainable_parameters())
        self.schedule: Callable[[int], Any] | None = None
        self.learning_rate = 0.0
        self.notify: Callable[[str], object] = lambda event: None

    def _epoch_steps(self) -> int:
        """Return the steps of the first epoch."""
        _, steps = self.groups(0)
        if steps is None:
            raise UserError("The training data have no length, so the number of steps is unknown: set max_steps.")
        return steps

    def run(self) -> Iterator[StepResult]:
        """Train to the last step. After each step, `state` is up to date and the measurements are yielded."""
        self._compile()
        state = self.state
        while state.global_step < self.steps:
            if hasattr(self.data, "set_epoch"):
                self.data.set_epoch(state.epochs_done)
            groups, steps = self.groups(state.epochs_done)
            before = state.global_step
            for number, (group, is_last) in enumerate(with_last(groups)):
                if number < state.epoch_step:  # done before the training was resumed
                    continue
                result = self.step(group)
                state.epoch = state.epochs_done + (number + 1) / steps if steps else state.global_step / self.steps
                state.epoch_step = number + 1
                if is_last:
                    state.epochs_done, state.epoch_step = state.epochs_done + 1, 0
                yield result
                if state.global_step == self.steps:
                    return
            if state.global_step == before:
                raise UserError(f"Epoch {state.epochs_done} of the training data has no items.")

    def groups(self, epoch: int) -> tuple[Iterable[list[Any]], int | None]:
        """Return the batches of each step of an epoch, or the indices of their items, and the number of steps.

        The number is None if the data have no length.
        """
        batches: Any
        if self.batches is not None:
            batches = self.batches(epoch)
            return grouped(batches, self.batches_per_step), math.ceil(len(batches) / self.batches_per_step)
        seed_libraries(shuffling_seed(self.args), epoch)
        if self.dataloader is not None:
            batches = self.dataloader()
        else:
            batches = map(self.collate, grouped(self.data, self.args.per_device_train_batch_size))
        steps = math.ceil(len(batches) / self.batches_per_step) if hasattr(batches, "__len__") else None
        return grouped(seeded(batches, shuffling_seed(self.args), epoch), self.batches_per_step), steps

    def step(self, items: Sequence[Any]) -> StepResult:
        """Update the weights once.

        Args:
            items: each batch of the step, or the indices of its items. The ranks share the batches.

        Raises:
            NonFiniteLossError: the loss or the norm of the gradients is infinite or NaN.
        """
        numbers = range(distributed.rank(), len(items), distributed.size())
        batches = [self._batch(items[number], number) for number in numbers]
        self.model.train()
        loss, gradients = self._gradients(batches)
        self.learning_rate = self.optimizer.learning_rate = self.rate(self.state.global_step)
        self.notify("on_pre_optimizer_step")
        norm: Any = self._update(gradients)
        del gradients  # so that their memory can be reused
        mx.eval(loss, norm, self.model.parameters(), self.optimizer.state, mx.random.state)
        loss, norm = loss.item(), norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            known = all(isinstance(batch, np.ndarray) for batch in items)
            contain = f"contain items {np.concatenate(items).tolist()}" if known else "are the next ones"
            raise NonFiniteLossError(
                f"Step {self.state.global_step + 1}: the loss is {loss}, the norm of the gradients {norm}. The "
                f"batches of this step {contain} of the training data. Nothing was written "
                "since the last checkpoint: check these items, or resume from the checkpoint with a lower "
                "learning rate."
            )
        self.notify("on_optimizer_step")
        tokens = distributed.all_sum(sum(token_count(batch) for batch in batches))
        self.state.global_step += 1
        self.state.loss_since_log += loss
        self.state.total_loss += loss
        self.state.tokens += tokens
        return StepResult(loss, norm, tokens)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if self.schedule is not None:
            return float(self.schedule(step))
        return self.optimizer.initial_learning_rate * self.args.learning_rate_factor(step, self.steps)

    def _batch(self, items: Any, number: int) -> Batch:
        """Return a batch, given itself or the indices of its items.

        Args:
            items: the batch or the indices.
            number: its place in the step. Random numbers of the data set and the collator depend on it and the step.
        """
        if not isinstance(items, np.ndarray):
            return self.to_arrays(items)
        seed_libraries(self.args.seed, self.state.global_step, number)
        return self.collate([self.data[int(item)] for item in items])

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
        _, steps = self.groups(state.epochs_done) if self.batches is not None else (None, None)
        if steps is not None:
            check("epoch_step", min(state.global_step, steps - 1))

    def arrays(self) -> dict[str, Any]:
        """Return the tree of arrays that a checkpoint stores."""
        return {
            "weights": self.model.trainable_parameters(),
            "optimizer": self.optimizer.state,
            "random": mx.random.state[0],  # type: ignore[index]
        }

    def _compile(self) -> None:
        model, optimizer = self.model.state, self.optimizer.state
        self._loss_and_gradients = nn.value_and_grad(self.model, self._weighted_loss)
        if self.compiles:
            self._loss_and_gradients = ops.compiled(self._loss_and_gradients, [model, mx.random.state])
        self._update = ops.compiled(lambda gradients: self.optimizer.update(self.model, gradients), [model, optimizer])

    def _gradients(self, batches: Sequence[Batch]) -> tuple[Any, Any]:
        """Return the loss of a step and its gradients, averaged over the labels of all batches and ranks.

        A batch counts by its number of labels, so the result does not depend on how a step is divided into batches.
        One without labels, whose mean loss is NaN, is not computed. A step without labels has loss 0 and gradients 0.
        """
        batches = [batch for batch in batches if label_count(batch, self.args.label_names)]
        labels = distributed.all_sum(sum(label_count(batch, self.args.label_names) for batch in batches))
        loss: Any = mx.array(0.0)
        gradients: Any = None
        for number, batch in enumerate(batches):
            if number:
                self.notify("on_substep_end")
            weight = mx.array(label_count(batch, self.args.label_names) * distributed.size() / labels)
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


def with_last(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield each item, and whether it is the last one."""
    iterator, missing = iter(items), object()
    item = next(iterator, missing)
    while item is not missing:
        following = next(iterator, missing)
        yield item, following is missing
        item = following


def label_count(batch: Mapping[str, np.ndarray], names: Sequence[str] | None = None) -> int:
    """Return the number of labels that take part in the loss of a batch; its rows if it has no column of labels.

    Args:
        batch: the batch.
        names: columns of labels; None for "labels".
    """
    labels = next((batch[name] for name in names or ["labels"] if batch.get(name) is not None), None)
    if labels is None:
        return len(next(iter(batch.values())))
    if np.issubdtype(labels.dtype, np.floating):  # every number is a label, even −100
        return labels.size
    return int((labels != IGNORE_INDEX).sum())


def token_count(batch: Mapping[str, np.ndarray]) -> int:
    """Return the number of real tokens of a batch, without padding."""
    mask = batch.get("attention_mask")
    if mask is None:
        return int(batch["input_ids"].size if "input_ids" in batch else 0)
    return int(mask.sum())


def to_mlx(batch: Mapping[str, np.ndarray]) -> dict[str, mx.array]:
    """Return a batch as MLX arrays."""
    return {name: mx.array(value) for name, value in batch.items()}
