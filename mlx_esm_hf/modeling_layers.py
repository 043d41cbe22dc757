"""What networks are built of: MLX's layers, computed by `ops`, and what those of several families do alike.

What stands in the place of a `Linear` (a quantized layer, one with an adapter) takes the same arguments: networks never
ask what a layer is, so a layer that could not fuse the activation or the residual is an error, not a slow path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_esm_hf import ops
from mlx_esm_hf.errors import UserError


class Linear(nn.Linear):
    """x · weightᵀ + bias, [..., inputs] to [..., outputs]; see `ops.linear`."""

    def __call__(
        self, x: mx.array, activation: str | None = None, residual: mx.array | None = None, output_scale: float = 1.0
    ) -> mx.array:
        return ops.linear(x, self.weight, self.get("bias"), residual, activation, output_scale)

    def to_quantized(
        self,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        quantize_input: bool = False,
        activation_dtype: str | None = None,
    ) -> QuantizedLinear:
        """What `mlx.nn.quantize` calls.

        Args:
            activation_dtype: see `ops.quantized_linear`.

        Raises:
            ValueError: activation_dtype are to be quantized, too.
        """
        if quantize_input:
            raise UserError(
                "quantize_input=True is not supported: only weights are quantized here, unless activation_dtype='int8'."
            )
        layer: Any = QuantizedLinear.from_linear(self, group_size, bits, mode)  # type: ignore[arg-type]
        layer.activation_dtype = activation_dtype
        return layer


def linear(config: Any, inputs: int, outputs: int, bias: bool = True) -> Linear:
    """A linear layer under transformers' initialisation: normal weights, no bias."""
    layer = Linear(inputs, outputs, bias=bias)
    layer.weight = mx.random.normal((outputs, inputs), scale=config.initializer_range)
    if bias:
        layer.bias = mx.zeros(outputs)
    return layer


class Embedding(nn.Embedding):
    """Vectors by their number: ids [...] to [..., dims]."""

    def to_quantized(
        self,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        quantize_input: bool = False,
        activation_dtype: str | None = None,
    ) -> QuantizedEmbedding:
        """What `mlx.nn.quantize` calls. Ids are not rounded, nor is what a tied output projection is given, whatever
        `activation_dtype` say.

        Raises:
            ValueError: a mode other than "affine": the others do not keep the dtype, which the whole network has from
                its embeddings. Or `quantize_input`: ids are no activations.
        """
        if mode != "affine":
            raise UserError(f"An embedding table can be quantized in mode 'affine', not in {mode!r}.")
        if quantize_input:
            raise UserError("quantize_input=True is not supported: only weights are quantized here.")
        return QuantizedEmbedding.from_embedding(self, group_size, bits, mode)  # type: ignore[arg-type, return-value]


class Packed(nn.Module):
    """What quantized layers have in common: their packed numbers are frozen for good, since `unfreeze` of a whole model
    empties the sets of its modules."""

    @property
    def _no_grad(self) -> set[str]:
        self._frozen.update(("weight", "scales", "biases"))
        return self._frozen

    @_no_grad.setter
    def _no_grad(self, names: set[str]) -> None:
        self._frozen = set(names)


class QuantizedLinear(Packed, nn.QuantizedLinear):
    """A `Linear` whose weight MLX has quantized (`mlx.nn.quantize`)."""

    activation_dtype: str | None = None  # "int8": x is rounded as well

    def __call__(
        self, x: mx.array, activation: str | None = None, residual: mx.array | None = None, output_scale: float = 1.0
    ) -> mx.array:
        return ops.quantized_linear(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            self.get("bias"),
            residual,
            activation,
            output_scale,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            activation_dtype=self.activation_dtype,
        )


class QuantizedEmbedding(Packed, nn.QuantizedEmbedding):
    """An `Embedding` whose table MLX has quantized."""

    def as_linear(self, x: mx.array) -> mx.array:
        """[..., dims] to [..., numbers], as a tied output projection."""
        return ops.quantized_linear(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )


def dequantized_weight(layer: nn.Module) -> mx.array:
    """The weight of a linear layer or an embedding as numbers [rows, columns], also where it is packed."""
    if not isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        return layer.weight
    return mx.dequantize(layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis, with or without a bias."""

    def __call__(self, x: mx.array) -> mx.array:
        return ops.layer_norm(x, self.weight, self.get("bias"), self.eps)


class TiedDecoder:
    """An output projection that has no weight of its own: it reads the model's input embeddings, whatever they are by
    now (resized, cast, quantized).

    Args:
        model: has `get_input_embeddings()`.
    """

    def __init__(self, model: Any):
        self._model = model

    @property
    def weight(self) -> mx.array:
        """[vocabulary, D]"""
        return self._model.get_input_embeddings().weight

    def __call__(self, x: mx.array) -> mx.array:
        """[..., D] to [..., vocabulary]"""
        return self._model.get_input_embeddings().as_linear(x)


def checkpointed(
    layer: nn.Module, layout: ops.Layout | None, position_embeddings: tuple[mx.array, mx.array] | None
) -> Callable[[mx.array], mx.array]:
    """A layer, [B, L, D] to [B, L, D], whose inside is computed again for its gradient instead of being kept."""
    return nn.utils.checkpoint(layer, lambda hidden_states: layer(hidden_states, layout, position_embeddings)[0])


def first_token(hidden_states: mx.array, attention_mask: mx.array | None) -> mx.array:
    """The state of each row's first real token, <cls>: [B, D].

    transformers reads position 0, which under left padding is a pad.
    """
    if attention_mask is None:
        return hidden_states[:, 0]
    first = mx.argmax(attention_mask.astype(mx.int32), axis=1)
    return mx.take_along_axis(hidden_states, first[:, None, None], axis=1)[:, 0]
