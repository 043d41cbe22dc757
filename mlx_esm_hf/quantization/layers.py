"""Packed weights: which layers of a model are quantized, and how.

`config.json` says it as mlx-lm does: {"quantization": {"group_size": 64, "bits": 4, "mode": "affine", ...}}, where a
path of a layer, such as "esm.encoder.layer.0.attention.self.query", may have settings of its own, or false. Beside the
packed "weight" such a layer has "scales" and, in the mode "affine", "biases"; see `mlx.core.quantize`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_esm_hf.errors import CheckpointError, UserError
from mlx_esm_hf.modeling_layers import Embedding, Linear, QuantizedLinear, dequantized_weight

# What MLX can do, the defaults first.
GROUP_SIZES = {"affine": (64, 32, 128), "mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
INTEGER_BITS = (4, 8)  # of a weight, where activations may be rounded as well
INTEGER_GROUP = 32  # the default there: one large activation costs its group precision, so groups are small
BITS = {"affine": (4, 2, 3, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,)}


class QuantSpec(NamedTuple):
    """How the weight of a layer is packed: `bits` a number, and scales for each `group_size` numbers of a row."""

    group_size: int
    bits: int
    mode: str = "affine"
    activation_dtype: str | None = None  # "int8": what is multiplied with the weight is rounded to 8 bits

    def settings(self) -> dict[str, Any]:
        """As the config has them: activation_dtype only where they are rounded, since mlx-lm knows no such thing."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def make_spec(
    bits: int | None = None, group_size: int | None = None, mode: str = "affine", activation_dtype: str | None = None
) -> QuantSpec:
    """A spec that there is, with the defaults of its mode.

    Raises:
        ValueError: there is no such spec.
    """
    if mode not in BITS:
        raise UserError(f"mode {mode!r} is not one of {', '.join(BITS)}.")
    usual_group = INTEGER_GROUP if activation_dtype and mode == "affine" else GROUP_SIZES[mode][0]
    spec = QuantSpec(group_size or usual_group, bits or BITS[mode][0], mode, activation_dtype)
    for name, value, possible in (
        ("bits", spec.bits, BITS[mode]),
        ("group size", spec.group_size, GROUP_SIZES[mode]),
    ):
        if value not in possible:
            raise UserError(f"{name} {value}: mode {mode!r} has {', '.join(map(str, sorted(possible)))}.")
    if activation_dtype not in (None, "int8"):
        raise UserError(f"activation_dtype {activation_dtype!r}: there is 'int8' alone, or none.")
    if activation_dtype and (mode != "affine" or spec.bits not in INTEGER_BITS):
        raise UserError(f"activation_dtype {activation_dtype!r} need mode 'affine' and 4 or 8 bits.")
    return spec


def spec_for(width: int, wanted: QuantSpec) -> QuantSpec | None:
    """`wanted`, with the largest group size up to its own that divides a row of `width` numbers; None, there is none.

    A group does not go beyond a row: 480 numbers, the width of ESM-2 35M, are no multiple of 64, but one of 32.
    """
    sizes = [size for size in GROUP_SIZES[wanted.mode] if size <= wanted.group_size and width % size == 0]
    return wanted._replace(group_size=max(sizes)) if sizes else None


def spec_of(layer: nn.Module) -> QuantSpec | None:
    """How a layer is packed; None if it is not."""
    if isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        return QuantSpec(layer.group_size, layer.bits, layer.mode, getattr(layer, "activation_dtype", None))
    return None


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of all layers of a model that are quantized or could be."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) or spec_of(module):
            yield path, module


# To and from config.json


def block_of(model: nn.Module) -> dict[str, Any] | None:
    """The block that says how a model is quantized; None if it is not."""
    specs = {path: spec_of(layer) for path, layer in sorted(layers(model), key=lambda pair: pair[0])}
    used = Counter(spec for spec in specs.values() if spec)
    if not used:
        return None
    usual = used.most_common(1)[0][0]
    others = {path: spec.settings() if spec else False for path, spec in specs.items() if spec != usual}
    return usual.settings() | others


def declare(config: Any, model: nn.Module) -> None:
    """Let a config say how the model is quantized, or say nothing if it is not.

    The copy under the name `quantization_config` is mlx-lm's, too: by it the Hub tells a quantized repository, and
    transformers refuses to load it, instead of reporting packed weights as weights of the wrong shape.
    """
    block = block_of(model)
    for name in ("quantization", "quantization_config"):
        vars(config).pop(name, None)
        if block:
            setattr(config, name, block)


def declared_specs(config: Any, names: Iterable[str], prefix: str, source: str) -> dict[str, QuantSpec]:
    """{path of a layer: how it is packed} for the layers of a checkpoint that have scales; neither with the prefix.

    Args:
        names: of the checkpoint's parameters.
        prefix: what a model with a head puts before the names of its base model.

    Raises:
        CheckpointError: the config does not say how they are packed, or what it says cannot be.
        ValueError: a checkpoint that was quantized for torch.
    """
    block: Any = getattr(config, "quantization", None)
    for_torch = getattr(config, "quantization_config", None)
    if not block and isinstance(for_torch, dict) and "quant_method" in for_torch:
        method = for_torch["quant_method"]
        raise UserError(f"{source} is quantized for torch ({method}), which MLX cannot read. Load one that is not.")
    packed = sorted(name.removesuffix(".scales") for name in names if name.endswith(".scales"))
    if packed and not isinstance(block, dict):
        raise CheckpointError(
            f"{source}: {packed[0]!r} and {len(packed) - 1} more layers are quantized, but the config has no "
            "`quantization` that says how. Load it with the config that belongs to it."
        )
    specs = {}
    for path in packed:
        bare = path.removeprefix(f"{prefix}.")
        settings = block.get(f"{prefix}.{bare}", block.get(bare, block))
        try:
            specs[bare] = make_spec(
                settings["bits"],
                settings["group_size"],
                settings.get("mode", "affine"),
                settings.get("activation_dtype"),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{source}: the config's `quantization` does not say how {path!r} is packed ({error})."
            ) from error
    return specs


# Layers of a model


def replace_layers(model: nn.Module, specs: Mapping[str, QuantSpec], prefix: str = "") -> None:
    """Put quantized layers into a model, for what `specs` names with or without the prefix; their weights are those
    of the layers that were there, packed when they are needed.

    Raises:
        ValueError: the rows of a layer are no multiple of its group size.
    """

    def settings(path: str, module: nn.Module) -> dict[str, Any] | bool:
        spec = specs.get(path.removeprefix(f"{prefix}."))
        return spec.settings() if spec and hasattr(module, "to_quantized") else False

    if specs:
        nn.quantize(model, class_predicate=settings)


def quantize_activations(model: nn.Module, activation_dtype: str, source: str) -> None:
    """Let the linear layers that can do it, those of 4 or 8 bits in the mode "affine", round what they are given.

    Raises:
        ValueError: there is no such layer, or no such rounding.
    """
    found = [(layer, spec) for _, layer in layers(model) if (spec := spec_of(layer))]
    fitting = [
        (layer, spec)
        for layer, spec in found
        if isinstance(layer, QuantizedLinear) and spec.mode == "affine" and spec.bits in INTEGER_BITS
    ]
    if not fitting:
        kinds = sorted({f"{spec.bits} bits ({spec.mode})" for _, spec in found})
        has = f"has layers of {', '.join(kinds)}" if kinds else "is not quantized"
        raise UserError(
            f"activation_dtype={activation_dtype!r} is for layers of 4 or 8 bits in mode 'affine', and {source} {has}. "
            "mlx-esm convert --quantize --bits 8 makes a checkpoint that has them."
        )
    for layer, spec in fitting:
        layer.activation_dtype = make_spec(spec.bits, spec.group_size, spec.mode, activation_dtype).activation_dtype


def has_int8_activations(model: nn.Module) -> bool:
    """Whether a layer rounds what it is given."""
    specs = [spec_of(layer) for _, layer in layers(model)]
    return any(spec is not None and spec.activation_dtype is not None for spec in specs)


def choose_specs(
    model: Any, usual: QuantSpec, rules: Mapping[str, QuantSpec | None]
) -> tuple[dict[str, QuantSpec], dict[str, int]]:
    """Choose how to quantize the layers of a model: {path: QuantSpec}, and {path: width} of those no group size fits.

    Args:
        model: an `MLXPreTrainedModel`; the layers that its class calls `quantized` are packed, the others not. Those
            that no checkpoint gave never are.
        usual: how.
        rules: {pattern of a path, as in a shell: how else, or None for full precision}; the last one that fits counts.

    Raises:
        ValueError: a rule fits no layer.
    """
    specs, too_narrow = {}, {}
    unused = set(rules)
    for path, layer in layers(model):
        bare = path.removeprefix(f"{model.base_model_prefix}.")
        wanted = usual if bare.startswith(model.quantized) else None
        for pattern, spec in rules.items():
            if fnmatchcase(path, pattern):
                unused.discard(pattern)
                wanted = spec
        if wanted is None or f"{path}.weight" in model.newly_initialized:
            continue
        width = layer.weight.shape[-1]
        if fitting := spec_for(width, wanted):
            specs[path] = fitting
        else:
            too_narrow[path] = width
    if unused:
        kinds = sorted({re.sub(r"\d+", "*", path) for path, _ in layers(model)})
        raise UserError(f"No layer is called {min(unused)!r}. There are {', '.join(kinds)}.")
    return specs, too_narrow


def dequantize_layers(model: nn.Module, dtype: mx.Dtype) -> None:
    """Put layers with whole weights of this dtype into the places of quantized ones."""
    replaced = []
    for path, layer in layers(model):
        if spec_of(layer) is None:
            continue
        weight = dequantized_weight(layer).astype(dtype)
        rows, columns = weight.shape
        if isinstance(layer, nn.QuantizedEmbedding):
            whole: nn.Module = Embedding(rows, columns)
        else:
            whole = Linear(columns, rows, bias="bias" in layer)
        whole.weight = weight
        if "bias" in layer:
            whole.bias = layer.bias
        replaced.append((path, whole))
    model.update_modules(tree_unflatten(replaced))
