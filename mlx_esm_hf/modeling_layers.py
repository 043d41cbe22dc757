"""Layers that all families share, computed by `ops`.

Every replacement of a `Linear` (a quantized layer, a layer with an adapter) takes the same arguments, so a network
never checks the type of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from itertools import groupby
from textwrap import indent
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_esm_hf import ops
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.ops.pairs import Affine

Part = TypeVar("Part", bound="Module")


def collapsed_repr(module: nn.Module) -> str:
    """Return the repr of a module and its children. Equal neighbours of a list share an entry, as in torch."""
    return _block(f"{type(module).__name__}({module._extra_repr()}", _entries(module.children()))


def _entries(children: dict[str, Any]) -> list[str]:
    """Return the lines of children: modules, and lists and dicts of them. Empty ones hold no modules."""
    lines = []
    for name, child in children.items():
        if isinstance(child, nn.Module):
            lines.append(f"({name}): {collapsed_repr(child)}")
        elif isinstance(child, list) and child:
            lines.append(f"({name}): {_list_repr(child)}")
        elif child:
            lines.append(f"({name}): {_block('dict(', _entries(child))}")
    return lines


def _list_repr(children: list[Any]) -> str:
    lines, first = [], 0
    texts = [entry.removeprefix("(x): ") for child in children for entry in _entries({"x": child})]
    for text, equal in groupby(texts):
        count = len(list(equal))
        lines.append(f"({first}): {text}" if count == 1 else f"({first}-{first + count - 1}): {count} x {text}")
        first += count
    return _block("list(", lines)


def _block(head: str, lines: Sequence[str]) -> str:
    body = "".join(f"\n{indent(line, '  ')}" for line in lines)
    return f"{head}{body}\n)" if lines else f"{head})"


# Elements that share a scale, by quantization mode, unless the caller chooses: MLX's defaults.
DEFAULT_GROUP_SIZES = {"affine": 64, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}


def can_group(layer: nn.Module, group_size: int | None, mode: str) -> bool:
    """Return whether groups of this size (None for the default) divide the rows of a layer's weight."""
    return layer.weight.shape[-1] % (group_size or DEFAULT_GROUP_SIZES.get(mode, 1)) == 0


class Module(nn.Module):
    """A part of a network, with those methods of torch's modules that scripts use."""

    __repr__ = collapsed_repr

    def requires_grad_(self: Part, requires_grad: bool = True) -> Part:
        """Freeze all parameters, or unfreeze them, as in torch."""
        if requires_grad:
            self.unfreeze()
        else:
            self.freeze()
        return self

    def named_parameters(self) -> Iterator[tuple[str, mx.array]]:
        """Yield (name, array) of each parameter."""
        yield from arrays_in(self)

    def named_children(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, module or list of modules) of the parts."""
        for name, child in self.children().items():
            if not name.startswith("_"):
                yield name, child

    def get_submodule(self, target: str) -> Any:
        """Return the part at a path such as "encoder.layer.0.attention".

        Raises:
            AttributeError: there is no such part.
        """
        return module_at(self, target) if target else self

    def get_parameter(self, target: str) -> mx.array:
        """Return the parameter with this name.

        Raises:
            AttributeError: there is no such parameter.
        """
        return module_at(self, target)


def arrays_in(tree: Any, path: str = "") -> Iterator[tuple[str, mx.array]]:
    """Yield (name, array) of a module's parameters, named as by `tree_flatten`.

    The generator is lazy: taking the first parameter does not walk through the others.
    """
    for key, value in enumerate(tree) if isinstance(tree, list) else tree.items():
        if str(key).startswith("_"):
            continue
        if isinstance(value, mx.array):
            yield f"{path}{key}", value
        elif isinstance(value, (dict, list)):
            yield from arrays_in(value, f"{path}{key}.")


def module_at(module: nn.Module, path: str) -> Any:
    """Return the module at a path such as "embeddings.word_embeddings"."""
    part: Any = module
    for name in path.split("."):
        part = part[int(name)] if isinstance(part, list) else getattr(part, name)
    return part


def parameters_of(layer: Any) -> Affine:
    """Return the weight and bias of a linear layer or layer norm, for an operation."""
    return Affine(layer.weight, layer.get("bias"))


class Linear(Module, nn.Linear):
    """x · weightᵀ + bias, [..., inputs] to [..., outputs]; see `ops.linear`."""

    def __call__(
        self, x: mx.array, activation: str | None = None, residual: mx.array | None = None, output_scale: float = 1.0
    ) -> mx.array:
        """Return x · weightᵀ + bias, then apply the activation, the scale and the residual."""
        return ops.linear(x, self.weight, self.get("bias"), residual, activation, output_scale)

    def to_quantized(
        self,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        quantize_input: bool = False,
        activation_dtype: str | None = None,
    ) -> QuantizedLinear | Linear:
        """Return the quantized layer, or this one if groups do not divide its width; `mlx.nn.quantize` calls this.

        Args:
            group_size: elements that share a scale; None for MLX's default.
            bits: bits per element; None for MLX's default.
            mode: MLX's quantization mode.
            quantize_input: must be False.
            activation_dtype: see `ops.quantized_linear`.

        Raises:
            ValueError: `quantize_input` is True.
        """
        if quantize_input:
            raise UserError(
                "quantize_input=True is not supported. To round the inputs of quantized layers, pass "
                "activation_dtype='int8'."
            )
        if not can_group(self, group_size, mode):
            return self
        layer: Any = QuantizedLinear.from_linear(self, group_size, bits, mode)  # type: ignore[arg-type]
        layer.activation_dtype = activation_dtype
        return layer


def linear(config: Any, inputs: int, outputs: int, bias: bool = True) -> Linear:
    """Return a linear layer with transformers' initialization: normal weights, zero bias."""
    layer = Linear(inputs, outputs, bias=bias)
    layer.weight = mx.random.normal((outputs, inputs), scale=config.initializer_range)
    if bias:
        layer.bias = mx.zeros(outputs)
    return layer


class Embedding(Module, nn.Embedding):
    """An embedding table: ids [...] to vectors [..., dims]."""

    def to_quantized(
        self,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        quantize_input: bool = False,
        activation_dtype: str | None = None,
    ) -> QuantizedEmbedding | Embedding:
        """Return the quantized table, or this one if groups do not divide its width; `mlx.nn.quantize` calls this.

        Args:
            group_size: elements that share a scale; None for MLX's default.
            bits: bits per element; None for MLX's default.
            mode: must be "affine". The other modes do not keep the dtype, which the network takes from its embeddings.
            quantize_input: must be False.
            activation_dtype: ignored. Neither ids nor the inputs of a tied output projection are rounded.

        Raises:
            ValueError: another `mode`, or `quantize_input` is True.
        """
        if mode != "affine":
            raise UserError(f"The quantization mode of an embedding table must be 'affine', got {mode!r}.")
        if quantize_input:
            raise UserError("quantize_input=True is not supported for an embedding table: its inputs are ids.")
        if not can_group(self, group_size, mode):
            return self
        return QuantizedEmbedding.from_embedding(self, group_size, bits, mode)  # type: ignore[arg-type]


class FrozenBuffers(Module):
    """Mixin for a module with arrays that are never trained.

    MLX's `unfreeze` clears the set `_no_grad` of every module in a model. Here each read adds the buffers to it again.

    Class attributes:
        frozen: names of the arrays.
    """

    frozen: ClassVar[tuple[str, ...]] = ()

    @property
    def _no_grad(self) -> set[str]:
        self._frozen.update(self.frozen)
        return self._frozen

    @_no_grad.setter
    def _no_grad(self, names: set[str]) -> None:
        self._frozen = set(names)


class QuantizedLinear(FrozenBuffers, nn.QuantizedLinear):
    """A `Linear` with a weight quantized by `mlx.nn.quantize`."""

    frozen = ("weight", "scales", "biases")
    activation_dtype: str | None = None  # "int8" also rounds the inputs

    def __call__(
        self, x: mx.array, activation: str | None = None, residual: mx.array | None = None, output_scale: float = 1.0
    ) -> mx.array:
        """Return what `Linear` returns for the dequantized weight."""
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


class QuantizedEmbedding(FrozenBuffers, nn.QuantizedEmbedding):
    """An `Embedding` with a table quantized by `mlx.nn.quantize`."""

    frozen = ("weight", "scales", "biases")

    def as_linear(self, x: mx.array) -> mx.array:
        """Multiply by the table as a tied output projection: [..., dims] to [..., vocabulary]."""
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
    """Return the floating-point weight [rows, columns] of a linear layer or an embedding, quantized or not."""
    if not isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        return layer.weight
    return mx.dequantize(layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode)


class LayerNorm(Module, nn.LayerNorm):
    """Layer norm over the last axis."""

    def __call__(self, x: mx.array) -> mx.array:
        """Normalize x [..., dims]."""
        return ops.layer_norm(x, self.weight, self.get("bias"), self.eps)


class TiedDecoder:
    """An output projection that shares the model's input embeddings.

    It reads the current embeddings at each call, so it follows when they are resized, cast or quantized.

    Args:
        model: has `get_input_embeddings()`.
    """

    def __init__(self, model: Any):
        self._model = model

    @property
    def weight(self) -> mx.array:
        """The embedding table, [vocabulary, D]."""
        return self._model.get_input_embeddings().weight

    def __call__(self, x: mx.array) -> mx.array:
        """Project [..., D] to [..., vocabulary]."""
        return self._model.get_input_embeddings().as_linear(x)


# Parts of several networks


def rotary_frequencies(head_dim: int, theta: float) -> mx.array:
    """Return the inverse frequencies [head_dim / 2] of rotary positions (Su et al. 2021), in float32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return mx.array(1 / np.float32(theta) ** exponents)


def rotary_angles(position_ids: mx.array, frequencies: mx.array) -> tuple[mx.array, mx.array]:
    """Return the cosines and sines [B, L, head_dim / 2] of the angles of positions [B, L], in float32."""
    # One float32 product, as in transformers: at position 1000 another rounding order is visible.
    angles = position_ids[..., None].astype(mx.float32) * frequencies.astype(mx.float32)
    return mx.cos(angles), mx.sin(angles)


def each_layer(
    layers: Sequence[nn.Module],
    hidden_states: mx.array,
    layout: ops.Layout | None,
    position_embeddings: tuple[mx.array, mx.array] | None,
    output_attentions: bool,
    checkpoint: bool = False,
) -> Iterator[tuple[mx.array, Any]]:
    """Run layers one after the other and yield each output [B, L, D] and its attentions [B, H, L, L], or None.

    Args:
        layers: called with the next four arguments.
        hidden_states: [B, L, D].
        layout: see `ops.attention`.
        position_embeddings: cosines and sines of the rotary angles.
        output_attentions: compute attentions.
        checkpoint: recompute a layer's intermediates for its gradient instead of storing them. Has no effect with
            `output_attentions`.
    """
    for layer in layers:
        if checkpoint and not output_attentions:
            hidden_states, attentions = checkpointed(layer, layout, position_embeddings)(hidden_states), None
        else:
            hidden_states, attentions = layer(hidden_states, layout, position_embeddings, output_attentions)
        yield hidden_states, attentions


def run_layers(
    layers: Sequence[nn.Module],
    hidden_states: mx.array,
    layout: ops.Layout | None,
    position_embeddings: tuple[mx.array, mx.array] | None,
    output_attentions: bool,
    output_hidden_states: bool,
    checkpoint: bool = False,
) -> tuple[mx.array, list[mx.array], tuple[mx.array, ...] | None]:
    """Run layers one after the other; see `each_layer`.

    Returns:
        The last layer's output; the input of each layer, empty unless `output_hidden_states`; and the attentions of
        each layer, None unless `output_attentions`. Arrays that are not requested are not referenced, because a
        reference would keep them in memory.
    """
    layer_inputs: list[mx.array] = []
    all_attentions: list[Any] = []
    outputs = each_layer(layers, hidden_states, layout, position_embeddings, output_attentions, checkpoint)
    for output, attentions in outputs:
        if output_hidden_states:
            layer_inputs.append(hidden_states)
        if output_attentions:
            all_attentions.append(attentions)
        hidden_states = output
    return hidden_states, layer_inputs, tuple(all_attentions) if output_attentions else None


def unpack_states(outputs: Any, layout: ops.Layout, dtype: mx.Dtype) -> None:
    """Bring the hidden states and attentions of an encoder's output from `layout` to [B, L, ...], in `dtype`.

    Hidden states are 0 at padding.
    """
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(
            layout.zero_padding(layout.unpack(x)).astype(dtype) for x in outputs.hidden_states
        )
    if outputs.attentions is not None:
        outputs.attentions = tuple(x.astype(dtype) for x in outputs.attentions)


def checkpointed(
    layer: nn.Module, layout: ops.Layout | None, position_embeddings: tuple[mx.array, mx.array] | None
) -> Callable[[mx.array], mx.array]:
    """Return a layer [B, L, D] to [B, L, D] that recomputes its intermediates for the gradient."""
    # Drawn here, so that the recomputation drops the same elements. MLX's random state would have moved on.
    key = mx.random.randint(-(1 << 31), (1 << 31) - 1, (2,), mx.int32).view(mx.uint32)

    def run(hidden_states: mx.array) -> mx.array:
        with dropout_keys(key):
            return layer(hidden_states, layout, position_embeddings)[0]

    return nn.utils.checkpoint(layer, run)


# Keys of the dropout masks, drawn one after the other; None draws from MLX's random state.
_dropout_keys: ContextVar[list[mx.array] | None] = ContextVar("dropout_keys", default=None)


@contextlib.contextmanager
def dropout_keys(key: mx.array) -> Iterator[None]:
    """Draw the masks of `Dropout` from a key instead of MLX's random state, so that they can be drawn again."""
    token = _dropout_keys.set([key])
    try:
        yield
    finally:
        _dropout_keys.reset(token)


class Dropout(nn.Dropout):
    """`mlx.nn.Dropout` whose mask can be drawn again; see `dropout_keys`."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return `x`, in training with elements set to 0 at random and the others scaled up."""
        keys = _dropout_keys.get()
        if keys is None or not self.training or self._p_1 == 1:
            return super().__call__(x)
        keys[0], key = mx.random.split(keys[0])
        return mx.random.bernoulli(self._p_1, x.shape, key) * x * (1 / self._p_1)


def first_token(hidden_states: mx.array, attention_mask: mx.array | None) -> mx.array:
    """Return the state [B, D] of each row's first real token, <cls>.

    transformers reads position 0, which is padding in a left-padded row.
    """
    if attention_mask is None:
        return hidden_states[:, 0]
    first = mx.argmax(attention_mask.astype(mx.int32), axis=1)
    return mx.take_along_axis(hidden_states, first[:, None, None], axis=1)[:, 0]


class ClassificationHead(Module):
    """Scores of a whole sequence from the state of <cls>: [B, L, D] to [B, num_labels]."""

    def __init__(self, config: Any, dropout: float | None):
        super().__init__()
        self.dense = linear(config, config.hidden_size, config.hidden_size)
        self.dropout = Dropout(dropout or 0)
        self.out_proj = linear(config, config.hidden_size, config.num_labels)

    def __call__(self, features: mx.array, attention_mask: mx.array | None = None) -> mx.array:
        """Return the scores [B, num_labels]."""
        x = self.dropout(first_token(features, attention_mask))
        x = self.dropout(mx.tanh(self.dense(x)))
        return self.out_proj(x)
