"""The adapted linear layer."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_esm_hf import ops
from mlx_esm_hf.modeling_layers import Dropout, Linear, Module, QuantizedLinear, dequantized_weight
from mlx_esm_hf.training.adapters.config import LoraConfig


class LoRALinear(Module):
    """A plain or quantized linear layer with an adapter, [..., inputs] to [..., outputs].

    LoRA computes x · (W + s B A)ᵀ + bias. DoRA rescales each row of W + s B A to the length stored in
    `lora_magnitude_vector`; the length before rescaling is a constant in the gradient, as in section 4.3 of the paper
    and in PEFT.

    The layer accepts the arguments of `Linear`.

    Args:
        base_layer: the layer to adapt.
        config: of the adapters.
        name: name of the layer, matched with the patterns in `config`.
    """

    not_saved = (
        "has an adapter, whose parameters have no place in a checkpoint of the model: save the adapter alone "
        "(save_adapter), or merge it into the model first (merge_adapters)"
    )

    def __init__(self, base_layer: Linear | QuantizedLinear, config: LoraConfig, name: str = ""):
        super().__init__()
        self.config = config
        self.scaling = config.scaling(name)
        self.base_layer = base_layer
        outputs, inputs = dequantized_weight(self.base_layer).shape
        r = config.rank(name)
        self.lora_A = Linear(inputs, r, bias=False)  # uniform within ±1/√inputs, as in PEFT
        self.lora_B = Linear(r, outputs, bias=False)
        if config.init_lora_weights == "gaussian":
            self.lora_A.weight = mx.random.normal((r, inputs), scale=1 / r)
        if config.init_lora_weights:
            self.lora_B.weight = mx.zeros((outputs, r))
        self.lora_dropout = Dropout(config.lora_dropout)
        if config.use_dora:
            self.lora_magnitude_vector = self._row_lengths()

    def __call__(
        self, x: mx.array, activation: str | None = None, residual: mx.array | None = None, output_scale: float = 1.0
    ) -> mx.array:
        """Return the output, [..., outputs]; arguments as in `Linear`."""
        if activation is not None:
            return ops.activated(self(x), residual, activation, output_scale)
        dropped = self.lora_dropout(x)
        low_rank = self.lora_A(dropped.astype(self.lora_A.weight.dtype)) * self.scaling
        if "lora_magnitude_vector" not in self:
            # Passing sums as residuals lets the matrix product add them.
            added = self.lora_B(low_rank, residual=residual, output_scale=output_scale).astype(x.dtype)
            return self.base_layer(x, residual=added, output_scale=output_scale)

        bias = self.base_layer.get("bias", 0)
        row_scale = self._row_scale()
        y = self.base_layer(dropped, residual=self.lora_B(low_rank).astype(x.dtype))
        y = row_scale * y + (1 - row_scale) * bias
        if self.training and self.config.lora_dropout:  # dropout is for the adapter only: add the base layer's share
            y = y + self.base_layer(x - dropped) - bias
        return ops.activated(y.astype(x.dtype), residual, None, output_scale)

    @property
    def weight(self) -> mx.array:
        """Weight of layer and adapter together, [outputs, inputs]."""
        base = dequantized_weight(self.base_layer)
        weight = self._sum() if "lora_magnitude_vector" not in self else self._row_scale()[:, None] * self._sum()
        return weight.astype(base.dtype)

    @property
    def bias(self) -> mx.array | None:
        """Bias of the layer, [outputs], or None."""
        return self.base_layer.get("bias")

    def adapter(self) -> dict[str, mx.array]:
        """Return {name: array} of the adapter's parameters, without those of the base layer."""
        parameters: Any = tree_flatten(self.parameters())
        return {name: array for name, array in parameters if not name.startswith("base_layer.")}

    def merged(self) -> Linear:
        """Return an equivalent layer without an adapter, frozen and not quantized."""
        outputs, inputs = dequantized_weight(self.base_layer).shape
        layer = Linear(inputs, outputs, bias=self.bias is not None)
        layer.weight = self.weight
        if self.bias is not None:
            layer.bias = self.bias
        layer.freeze()
        layer.train(self.training)
        return layer

    def _sum(self) -> mx.array:
        """Return W + s B A."""
        return dequantized_weight(self.base_layer) + self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    def _row_lengths(self) -> mx.array:
        return mx.linalg.norm(self._sum(), axis=1)

    def _row_scale(self) -> mx.array:
        return self.lora_magnitude_vector / mx.stop_gradient(self._row_lengths())
