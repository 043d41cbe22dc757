"""AdamW with gradient clipping."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_esm_hf import ops

# Names of parameters without weight decay: the same as in transformers' Trainer.
NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


class AdamW:
    """AdamW with the formula of torch and of transformers' `Trainer`.

    `ops.adamw` passes over each parameter once, where `mlx.optimizers.AdamW` needs about a dozen operations on it.

    Args:
        parameters: a tree of the parameters to train.
        learning_rate: the initial learning rate. The loop sets `state["learning_rate"]` before each step.
        betas: decay rates of the two moments.
        epsilon: added to the denominator.
        weight_decay: applied to all parameters except biases and norms.
        max_grad_norm: gradients whose norm, over all parameters, is larger are scaled down to it; 0 turns this off.

    Attributes:
        state: everything that changes: step, learning rate and both moments.
    """

    def __init__(
        self,
        parameters: Any,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
    ):
        self.betas, self.epsilon = betas, epsilon
        self.weight_decay, self.max_grad_norm = weight_decay, max_grad_norm
        self.state: dict[str, Any] = {
            "step": mx.array(0, mx.uint64),
            "learning_rate": mx.array(learning_rate),
            "mean": tree_map(mx.zeros_like, parameters),
            "square": tree_map(mx.zeros_like, parameters),
        }

    def update(self, model: nn.Module, gradients: Any) -> mx.array:
        """Update the model's parameters and return the norm of the gradients before clipping.

        Args:
            model: the model whose trainable parameters are updated.
            gradients: a tree like that of the parameters.
        """
        state, named = self.state, dict[str, mx.array](tree_flatten(gradients))
        norm = mx.sqrt(sum(ops.sum_of_squares(x) for x in named.values()))  # type: ignore[arg-type]
        scale = mx.minimum(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm else mx.array(1.0)
        state["step"] = state["step"] + 1
        weights, means, squares = (
            dict[str, mx.array](tree_flatten(tree))
            for tree in (model.trainable_parameters(), state["mean"], state["square"])
        )
        for name, gradient in named.items():
            weights[name], means[name], squares[name] = ops.adamw(
                weights[name],
                gradient,
                means[name],
                squares[name],
                scale,
                state["learning_rate"],
                state["step"],
                self.betas,
                self.epsilon,
                0.0 if NOT_DECAYED.search(name) else self.weight_decay,
            )
        state["mean"], state["square"] = tree_unflatten(list(means.items())), tree_unflatten(list(squares.items()))
        model.update(tree_unflatten(list(weights.items())))
        return norm
