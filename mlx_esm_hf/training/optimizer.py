"""AdamW with parameter groups, the optimizers of MLX, and gradient clipping."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

from mlx_esm_hf import ops
from mlx_esm_hf.checks import suggestion
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.optimizer_names import kind_of, options_of

# Names of parameters without weight decay: the same as in transformers' Trainer.
NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)

Group = Mapping[str, Any]


class AdamW:
    """AdamW with the formula of torch and of transformers' `Trainer`.

    `ops.adamw` passes over each parameter once, where `mlx.optimizers.AdamW` needs about a dozen operations on it.

    Args:
        parameters: a tree of the parameters to train.
        learning_rate: the initial learning rate. The loop sets the property before each step.
        betas: decay rates of the two moments.
        epsilon: added to the denominator.
        weight_decay: applied to all parameters except biases and norms.
        max_grad_norm: gradients whose norm, over all parameters, is larger are scaled down to it; 0 turns this off.
        groups: parameter groups, as in torch: dictionaries with the names of parameters under "params" and, optionally,
            "lr" and "weight_decay", which also applies to biases and norms of the group. A schedule scales all
            learning rates alike. Parameters in no group are not trained.

    Attributes:
        state: everything that changes: step, learning rate and both moments.
        initial_learning_rate: the learning rate at the start.

    Raises:
        UserError: a group contains an unknown name, or one that another group contains.

    Example:
        >>> names = [name for name, _ in tree_flatten(model.trainable_parameters())]
        >>> head = {"params": [name for name in names if "classifier" in name], "lr": 1e-3}
        >>> rest = {"params": [name for name in names if "classifier" not in name]}
        >>> AdamW(model.trainable_parameters(), 1e-5, groups=[head, rest])
    """

    def __init__(
        self,
        parameters: Any,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        groups: Sequence[Group] | None = None,
    ):
        self.betas, self.epsilon = betas, epsilon
        self.max_grad_norm = max_grad_norm
        self.initial_learning_rate = float(learning_rate)
        named: Any = tree_flatten(parameters)
        if groups is None:
            decays = {name: weight_decay if is_decayed(name) else 0.0 for name, _ in named}
            self._settings = {name: (1.0, decay) for name, decay in decays.items()}
        else:
            self._settings = _settings_of(groups, [name for name, _ in named], learning_rate, weight_decay)
        trained = tree_unflatten([(name, x) for name, x in named if name in self._settings])
        self.state: dict[str, Any] = {
            "step": mx.array(0, mx.uint64),
            "learning_rate": mx.array(learning_rate),
            "mean": tree_map(mx.zeros_like, trained),
            "square": tree_map(mx.zeros_like, trained),
        }

    @property
    def learning_rate(self) -> float:
        """The learning rate. Groups keep the ratio of theirs to it."""
        return self.state["learning_rate"].item()

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self.state["learning_rate"] = mx.array(value)

    def update(self, model: nn.Module, gradients: Any) -> mx.array:
        """Update the model's parameters and return the norm of the gradients before clipping.

        Args:
            model: the model whose trainable parameters are updated.
            gradients: a tree like that of the parameters.
        """
        state, named = self.state, dict[str, mx.array](tree_flatten(gradients))
        norm, scale = norm_and_scale(gradients, self.max_grad_norm)
        state["step"] = state["step"] + 1
        weights, means, squares = (
            dict[str, mx.array](tree_flatten(tree))
            for tree in (model.trainable_parameters(), state["mean"], state["square"])
        )
        rates = {ratio: state["learning_rate"] * ratio for ratio, _ in self._settings.values() if ratio != 1}
        for name, (ratio, decay) in self._settings.items():
            weights[name], means[name], squares[name] = ops.adamw(
                weights[name],
                named[name],
                means[name],
                squares[name],
                scale,
                rates.get(ratio, state["learning_rate"]),
                state["step"],
                self.betas,
                self.epsilon,
                decay,
            )
        state["mean"], state["square"] = tree_unflatten(list(means.items())), tree_unflatten(list(squares.items()))
        model.update(tree_unflatten(list(weights.items())))
        return norm


class ClippedOptimizer:
    """An optimizer of `mlx.optimizers` with gradient clipping, and weight decay for all but biases and norms.

    Args:
        optimizer: the optimizer; also a `MultiOptimizer`. Its own schedule, if it has one, sets its learning rate.
        parameters: a tree of the parameters to train.
        max_grad_norm: gradients whose norm, over all parameters, is larger are scaled down to it; 0 turns this off.
        weight_decay: added to what the optimizer does itself.
        decoupled: whether the decay shrinks the weights, as in AdamW, or is added to the gradients, as in torch's SGD.

    Attributes:
        initial_learning_rate: the learning rate at the start; 0 if the optimizer has none.
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        parameters: Any,
        max_grad_norm: float = 0.0,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ):
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm
        self.weight_decay, self.decoupled = weight_decay, decoupled
        optimizer.init(parameters)
        self._initial = [part.learning_rate.item() for part in self._parts()]
        self.initial_learning_rate: float = self._initial[0] if self._initial else 0.0

    def _parts(self) -> list[optim.Optimizer]:
        """Return the optimizers that have a learning rate."""
        parts = getattr(self.optimizer, "optimizers", [self.optimizer])
        return [part for part in parts if "learning_rate" in part.state]

    @property
    def state(self) -> dict[str, Any]:
        """Everything that changes."""
        return self.optimizer.state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.optimizer.state = state

    @property
    def learning_rate(self) -> float:
        """The learning rate. The parts of a `MultiOptimizer` keep the ratio of theirs to it."""
        parts = self._parts()
        return parts[0].learning_rate.item() if parts else 0.0

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for part, initial in zip(self._parts(), self._initial, strict=True):
            part.learning_rate = value * initial / self.initial_learning_rate if self.initial_learning_rate else value

    def update(self, model: nn.Module, gradients: Any) -> mx.array:
        """Update the model's parameters and return the norm of the gradients before clipping.

        Args:
            model: the model whose trainable parameters are updated.
            gradients: a tree like that of the parameters.
        """
        norm, scale = norm_and_scale(gradients, self.max_grad_norm)
        if self.max_grad_norm:
            gradients = tree_map(lambda x: x * scale, gradients)
        decay, weights = self.weight_decay, model.trainable_parameters()
        if decay and self.decoupled:
            left = 1 - self._parts()[0].learning_rate * decay
            model.update(tree_map_with_path(lambda name, w: w * left if is_decayed(name) else w, weights))
        elif decay:
            gradients = tree_map_with_path(
                lambda name, x, w: x + decay * w if is_decayed(name) else x, gradients, weights
            )
        self.optimizer.update(model, gradients)
        return norm


def create_optimizer(args: MLXTrainingArguments, parameters: Any) -> AdamW | ClippedOptimizer:
    """Return the optimizer that `optim` names, with the settings of the arguments.

    Args:
        args: the arguments.
        parameters: a tree of the parameters to train.

    Source: `transformers.trainer_optimizer`.
    """
    kind, rate, betas = kind_of(args.optim), args.learning_rate, (args.adam_beta1, args.adam_beta2)
    if kind == "adamw":
        return AdamW(parameters, rate, betas, args.adam_epsilon, args.weight_decay, args.max_grad_norm)
    options = options_of(kind, args.optim_args)
    optimizer: optim.Optimizer
    if kind == "sgd":
        optimizer = optim.SGD(rate, **options)
    elif kind == "adagrad":
        optimizer = optim.Adagrad(rate, **{"eps": 1e-10} | options)  # torch's default
    elif kind == "rmsprop":
        optimizer = optim.RMSprop(rate, **options)
    elif kind == "adafactor":
        optimizer = optim.Adafactor(rate, **{"scale_parameter": False, "relative_step": False} | options)
    else:
        optimizer = optim.Lion(rate, list(betas))
    decoupled = kind in ("adafactor", "lion")
    return ClippedOptimizer(optimizer, parameters, args.max_grad_norm, args.weight_decay, decoupled)


def prepare_optimizer(optimizer: Any, parameters: Any, max_grad_norm: float) -> AdamW | ClippedOptimizer:
    """Return an optimizer of the user as one that clips gradients to the norm of the arguments.

    Args:
        optimizer: an `AdamW` of this module, or an optimizer of `mlx.optimizers`.
        parameters: a tree of the parameters to train.
        max_grad_norm: norm of the arguments; 0 turns clipping off.

    Raises:
        UserError: the optimizer is another one, such as torch's.
    """
    if isinstance(optimizer, optim.Optimizer):
        return ClippedOptimizer(optimizer, parameters, max_grad_norm)
    if not isinstance(optimizer, AdamW | ClippedOptimizer):
        kind = type(optimizer)
        raise UserError(
            f"The optimizer must be one of mlx.optimizers or mlx_esm_hf.training.optimizer.AdamW, got "
            f"{kind.__module__}.{kind.__qualname__}."
        )
    optimizer.max_grad_norm = optimizer.max_grad_norm or max_grad_norm
    return optimizer


def is_decayed(name: str) -> bool:
    """Return whether weight decay applies to the parameter of this name: it is neither a bias nor part of a norm."""
    return NOT_DECAYED.search(name) is None


def norm_and_scale(gradients: Any, max_grad_norm: float) -> tuple[mx.array, mx.array]:
    """Return the norm of a tree of gradients, and the factor that reduces it to at most `max_grad_norm`, unless 0."""
    named: Any = tree_flatten(gradients)
    norm = mx.sqrt(sum(ops.sum_of_squares(x) for _, x in named))  # type: ignore[arg-type]
    return norm, mx.minimum(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm else mx.array(1.0)


def _settings_of(
    groups: Sequence[Group], known: Sequence[str], learning_rate: float, weight_decay: float
) -> dict[str, tuple[float, float]]:
    """Return {name: (learning rate as a multiple of the first one, weight decay)} of the parameters in groups."""
    settings: dict[str, tuple[float, float]] = {}
    for group in groups:
        rate = group.get("lr", learning_rate)
        if rate != learning_rate and not learning_rate:
            raise UserError(f"A parameter group has lr={rate}, which needs a learning rate of the optimizer above 0.")
        if unknown := group.keys() - {"params", "lr", "weight_decay"}:
            raise UserError(f"Parameter groups have params, lr and weight_decay, got {', '.join(sorted(unknown))}.")
        for name in group["params"]:
            if not isinstance(name, str):
                raise UserError('The "params" of a group must be names of parameters, got an array.')
            if name not in known:
                raise UserError(f"There is no trainable parameter {name!r}.{suggestion(name, known)}")
            if name in settings:
                raise UserError(f"{name} is in two parameter groups.")
            settings[name] = (
                rate / learning_rate if rate != learning_rate else 1.0,
                group.get("weight_decay", weight_decay),
            )
    return settings
