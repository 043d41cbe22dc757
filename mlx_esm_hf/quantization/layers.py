"""Which layers of a model are quantized, and how.

`config.json` has the same block as mlx-lm's: {"quantization": {"group_size": 64, "bits": 4, "mode": "affine", ...}}.
The path of a layer, such as "esm.encoder.layer.0.attention.self.query", may be a key with settings of its own or
false. A quantized layer has "weight", "scales" and, in mode "affine", "biases"; see `mlx.core.quantize`.
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

from mlx_esm_hf.checks import check_choice
from mlx_esm_hf.errors import CheckpointError, UserError
from mlx_esm_hf.modeling_layers import Embedding, Linear, QuantizedLinear, can_group, dequantized_weight

# What MLX supports, defaults first.
GROUP_SIZES = {"affine": (64, 32, 128), "mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
INTEGER_BITS = (4, 8)  # bits of weights that can be multiplied with int8 inputs
INTEGER_GROUP = 32  # default group size with int8 inputs: one large input degrades its whole group
SETTINGS = {"bits": int, "group_size": int, "mode": str, "activation_dtype": str}  # of a layer in a config
REQUIRED = ("bits", "group_size")
NAMES_OF_TYPES = {int: "an integer", str: "a string"}
BITS = {"affine": (4, 2, 3, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,)}


class QuantSpec(NamedTuple):
    """How a layer is quantized.

    Attributes:
        group_size: consecutive weights of a row that share a scale.
        bits: bits per weight.
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".
        activation_dtype: "int8" if the layer's inputs are rounded to 8 bits.
    """

    group_size: int
    bits: int
    mode: str = "affine"
    activation_dtype: str | None = None

    def settings(self) -> dict[str, Any]:
        """Return the settings for the config, without an `activation_dtype` of None, which mlx-lm does not know."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def make_spec(
    bits: int | None = None, group_size: int | None = None, mode: str = "affine", activation_dtype: str | None = None
) -> QuantSpec:
    """Return a spec with the defaults of its mode.

    Raises:
        ValueError: MLX does not support this combination.
    """
    check_choice("mode", mode, BITS)
    usual_group = INTEGER_GROUP if activation_dtype and mode == "affine" else GROUP_SIZES[mode][0]
    spec = QuantSpec(
        usual_group if group_size is None else group_size,
        BITS[mode][0] if bits is None else bits,
        mode,
        activation_dtype,
    )
    for name, value, possible in (
        ("bits", spec.bits, BITS[mode]),
        ("group_size", spec.group_size, GROUP_SIZES[mode]),
    ):
        if type(value) is not int or value not in possible:
            known = ", ".join(map(str, sorted(possible)))
            raise UserError(f"{name} must be one of {known} in mode {mode!r}, got {value}.")
    if activation_dtype is not None:
        check_choice("activation_dtype", activation_dtype, ["int8"])
    if activation_dtype and (mode != "affine" or spec.bits not in INTEGER_BITS):
        raise UserError(f"activation_dtype {activation_dtype!r} needs mode 'affine' and 4 or 8 bits.")
    return spec


def spec_for(width: int, wanted: QuantSpec) -> QuantSpec | None:
    """Return `wanted` with the largest group size, up to its own, that divides `width`; None if none does.

    A group lies within a row. ESM-2 35M, for example, is 480 wide: a multiple of 32, but not of 64.
    """
    sizes = [size for size in GROUP_SIZES[wanted.mode] if size <= wanted.group_size and width % size == 0]
    return wanted._replace(group_size=max(sizes)) if sizes else None


def spec_of(layer: nn.Module) -> QuantSpec | None:
    """Return how a layer is quantized; None if it is not."""
    if isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        return QuantSpec(layer.group_size, layer.bits, layer.mode, getattr(layer, "activation_dtype", None))
    return None


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, layer) for all layers of a model that are or could be quantized."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) or spec_of(module):
            yield path, module


# To and from config.json


def block_of(model: nn.Module) -> dict[str, Any] | None:
    """Return the config block that describes how a model is quantized; None if it is not."""
    specs = {path: spec_of(layer) for path, layer in sorted(layers(model), key=lambda pair: pair[0])}
    used = Counter(spec for spec in specs.values() if spec)
    if not used:
        return None
    usual = used.most_common(1)[0][0]
    others = {path: spec.settings() if spec else False for path, spec in specs.items() if spec != usual}
    return usual.settings() | others


def declare(config: Any, model: nn.Module) -> None:
    """Write into a config how the model is quantized, or remove the block if it is not.

    Like mlx-lm, also write a copy under `quantization_config`: the Hub uses it to recognize quantized repositories, and
    transformers refuses to load them instead of reporting weights of the wrong shape.
    """
    block = block_of(model)
    for name in ("quantization", "quantization_config"):
        vars(config).pop(name, None)
        if block:
            setattr(config, name, block)


def prefixed_block(block: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return a config block for a model that holds the described one under the name `prefix`."""
    return {name if name in SETTINGS else f"{prefix}.{name}": value for name, value in block.items()}


def declared_specs(config: Any, names: Iterable[str], prefix: str, source: str) -> dict[str, QuantSpec]:
    """Return {path without prefix: QuantSpec} for the layers of a checkpoint that have scales.

    Args:
        config: the checkpoint's config.
        names: names of the checkpoint's parameters.
        prefix: base-model prefix of models with a head.
        source: Hub id or folder, for messages.

    Raises:
        CheckpointError: the config does not describe the quantization, or describes an unsupported one.
        ValueError: the checkpoint was quantized for torch.
    """
    block: Any = getattr(config, "quantization", None)
    for_torch = getattr(config, "quantization_config", None)
    if not block and isinstance(for_torch, dict) and "quant_method" in for_torch:
        method = for_torch["quant_method"]
        raise UserError(
            f"{source} is quantized for torch ({method}), which MLX cannot read. Load the full-precision one."
        )
    quantized = sorted(name.removesuffix(".scales") for name in names if name.endswith(".scales"))
    if quantized and not isinstance(block, dict):
        raise CheckpointError(
            f"{source}: {quantized[0]!r} and {len(quantized) - 1} more layers are quantized, but the config has no "
            "`quantization` block. Load it with the config that belongs to it."
        )
    specs = {}
    for path in quantized:
        bare = path.removeprefix(f"{prefix}.")
        settings = block.get(f"{prefix}.{bare}", block.get(bare, block))
        try:
            specs[bare] = spec_from(settings)
        except ValueError as error:
            raise CheckpointError(
                f"{source}: the config's `quantization` block does not describe {path!r}: {error}"
            ) from error
    return specs


def spec_from(settings: Any) -> QuantSpec:
    """Return the spec of a config's settings for a layer.

    Raises:
        ValueError: settings are missing, or have another type or value than MLX supports. The message names the key.
    """
    if not isinstance(settings, dict):
        raise UserError(f"expected its settings, got {settings!r}.")
    others = {name for name, value in settings.items() if not isinstance(value, (dict, bool))}  # those are layers
    if unknown := sorted(others - SETTINGS.keys()):
        raise UserError(f"{unknown[0]!r} is unknown (known: {', '.join(SETTINGS)}).")
    for name, kind in SETTINGS.items():
        value = settings.get(name)
        if value is None and name in REQUIRED:
            raise UserError(f"{name!r} is missing.")
        if value is not None and type(value) is not kind:  # True is an int, and 8.0 equals 8
            raise UserError(f"{name!r} must be {NAMES_OF_TYPES[kind]}, got {value!r}.")
        if value == 0:
            raise UserError(f"{name!r} must be at least 1, got 0.")
    return make_spec(**{name: settings[name] for name in SETTINGS if settings.get(name) is not None})


# Layers of a model


def replace_layers(model: nn.Module, specs: Mapping[str, QuantSpec], prefix: str = "") -> None:
    """Replace layers of a model by quantized ones. Their weights are quantized lazily.

    Args:
        model: the model.
        specs: {path, with or without the prefix: QuantSpec}.
        prefix: base-model prefix of models with a head.

    Raises:
        ValueError: the width of a layer is not a multiple of its group size.
    """

    def settings(path: str, module: nn.Module) -> dict[str, Any] | bool:
        spec = specs.get(path.removeprefix(f"{prefix}."))
        if not spec or not hasattr(module, "to_quantized"):
            return False
        if not can_group(module, spec.group_size, spec.mode):
            raise UserError(
                f"{path} is {module.weight.shape[-1]} wide, which groups of {spec.group_size} do not divide."
            )
        return spec.settings()

    if specs:
        nn.quantize(model, class_predicate=settings)


def quantize_activations(model: nn.Module, activation_dtype: str, source: str) -> None:
    """Set the `activation_dtype` of all quantized linear layers of 4 or 8 bits in mode "affine".

    Raises:
        ValueError: the model has no such layer, or the dtype is not supported.
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
        raise needs_layers(activation_dtype, source, has)
    for layer, spec in fitting:
        layer.activation_dtype = make_spec(spec.bits, spec.group_size, spec.mode, activation_dtype).activation_dtype


def check_activation_dtype(activation_dtype: str | None, config: Any, source: str) -> None:
    """Refuse an `activation_dtype` for a checkpoint that is not quantized, before its weights are loaded.

    Raises:
        ValueError: the config declares no quantization.
    """
    if activation_dtype is not None and not getattr(config, "quantization", None):
        raise needs_layers(activation_dtype, source, "is not quantized")


def needs_layers(activation_dtype: str, source: str, has: str) -> UserError:
    """Return the error about a model without layers that can round their inputs."""
    return UserError(
        f"activation_dtype={activation_dtype!r} needs layers of 4 or 8 bits in mode 'affine', but {source} {has}. "
        "Quantize it with mlx-esm convert --quantize --bits 8."
    )


def has_int8_activations(model: nn.Module) -> bool:
    """Return whether any layer rounds its inputs to int8."""
    specs = [spec_of(layer) for _, layer in layers(model)]
    return any(spec is not None and spec.activation_dtype is not None for spec in specs)


def choose_specs(
    model: Any, usual: QuantSpec, rules: Mapping[str, QuantSpec | None]
) -> tuple[dict[str, QuantSpec], dict[str, int]]:
    """Choose how to quantize the layers of a model.

    Args:
        model: an `MLXPreTrainedModel`. By default the layers listed by its class in `quantized` are quantized. Layers
            that the checkpoint lacked never are.
        usual: the default spec.
        rules: {shell pattern of a path: spec, or None for full precision}; the last match counts.

    Returns:
        {path: QuantSpec}, and {path: width} of the layers whose width no group size divides.

    Raises:
        ValueError: a rule matches no layer.
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
        raise UserError(f"No layer matches {min(unused)!r}. The layers are {', '.join(kinds)}.")
    return specs, too_narrow


def dequantize_layers(model: nn.Module, dtype: mx.Dtype) -> None:
    """Replace quantized layers by plain ones with weights of this dtype."""
    replaced = []
    for path, layer in layers(model):
        if spec_of(layer) is None:
            continue
        weight = dequantized_weight(layer).astype(dtype)
        rows, columns = weight.shape
        if isinstance(layer, nn.QuantizedEmbedding):
            plain: nn.Module = Embedding(rows, columns)
        else:
            plain = Linear(columns, rows, bias="bias" in layer)
        plain.weight = weight
        if "bias" in layer:
            plain.bias = layer.bias
        replaced.append((path, plain))
    model.update_modules(tree_unflatten(replaced))
