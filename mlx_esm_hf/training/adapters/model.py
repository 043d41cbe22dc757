"""Adapters in a model: choose its layers, add adapters and merge them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_esm_hf.checkpoint.names import names_in
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_layers import Linear, QuantizedLinear
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.training.adapters.config import ALL_LINEAR, LoraConfig, has_suffix
from mlx_esm_hf.training.adapters.layer import LoRALinear


def add_adapters(model: MLXPreTrainedModel, config: LoraConfig) -> MLXPreTrainedModel:
    """Freeze a model and add trainable adapters to it, in place.

    New adapters do not change the outputs, since B is zero. The modules to save are trainable as well.
    `model.num_parameters(only_trainable=True)` counts both.

    Returns:
        The model.

    Raises:
        ValueError: the model already has adapters, no module has such a name, or a module is not a linear layer.
    """
    check_no_adapters(model)
    layers, modules = choose_layers(model, config)
    insert(model, layers, modules)
    return model


def merge_adapters(model: MLXPreTrainedModel) -> MLXPreTrainedModel:
    """Replace adapted layers by equivalent `Linear` layers without adapters, in place. They are frozen.

    A quantized layer becomes a plain one. To make the model small again, quantize it (`mlx.nn.quantize`).

    Returns:
        The model.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = adapted_layers(model)
    while layers:  # one by one, so that there is never a second copy of all weights
        name, layer = layers.popitem()
        merged = layer.merged()
        mx.eval(merged.parameters())
        model.update_modules(tree_unflatten([(name, merged)]))
    return model


def has_adapters(model: MLXPreTrainedModel) -> bool:
    """Return whether a model has adapters."""
    return bool(_find_adapted(model))


def check_no_adapters(model: MLXPreTrainedModel) -> None:
    """Raise UserError if a model has adapters."""
    if has_adapters(model):
        raise UserError(
            f"{type(model).__name__} already has adapters: merge them (merge_adapters) before adding others."
        )


def adapted_layers(model: MLXPreTrainedModel) -> dict[str, LoRALinear]:
    """Return {name: adapted layer} of a model.

    Raises:
        UserError: it has no adapters.
    """
    if not (layers := _find_adapted(model)):
        raise UserError(f"{type(model).__name__} has no adapters: call add_adapters or load_adapter first.")
    return layers


def modules_to_save(model: MLXPreTrainedModel, config: LoraConfig) -> dict[str, nn.Module]:
    """Return {our name: module} of the modules that are trained and saved in full."""
    chosen = {ours for theirs, ours in _peft_names(model).items() if has_suffix(theirs, config.trained_modules)}
    return {name: module for name, module in model.named_modules() if name in chosen}


def choose_layers(model: MLXPreTrainedModel, config: LoraConfig) -> tuple[dict[str, LoRALinear], dict[str, nn.Module]]:
    """Return {name: adapted layer} to insert and {name: module} to save. The model stays as it is.

    Raises:
        UserError: the configuration does not fit the model.
    """
    all_modules = dict(model.named_modules())
    modules = modules_to_save(model, config)
    if config.trained_modules and not modules:
        names = ", ".join(model.children())
        raise UserError(f"modules_to_save={config.trained_modules}: no such module found. The model has {names}.")
    for name, module in modules.items():
        quantized = [inner for inner, part in module.named_modules() if isinstance(part, nn.QuantizedLinear)]
        if quantized:
            where = f"{name}.{quantized[0]}".rstrip(".")
            raise UserError(f"{where} is quantized and cannot be trained: leave it out of modules_to_save.")

    layers: dict[str, LoRALinear] = {}
    saved_prefixes = tuple(f"{name}." for name in modules)
    for theirs, name in _peft_names(model).items():
        layer = all_modules[name]
        if config.target_modules == ALL_LINEAR:
            wanted = isinstance(layer, Linear | QuantizedLinear) and layer is not model.get_output_embeddings()
        else:
            wanted = config.targets(theirs)
        if not wanted or f"{name}.".startswith(saved_prefixes):
            continue
        if not isinstance(layer, Linear | QuantizedLinear):
            raise UserError(
                f"target_modules: {theirs} must be a linear layer, got {type(layer).__name__}. Adapters are for linear "
                "layers only."
            )
        layers[name] = LoRALinear(layer, config, theirs)
    if not layers:
        linear = [
            key for key, name in _peft_names(model).items() if isinstance(all_modules[name], Linear | QuantizedLinear)
        ]
        known = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in linear)
        raise UserError(
            f"target_modules={config.target_modules!r}: no such linear layer found in {type(model).__name__}. It has "
            f"(N is a number): {', '.join(known)}."
        )
    return layers, modules


def insert(model: MLXPreTrainedModel, layers: Mapping[str, LoRALinear], modules: Mapping[str, nn.Module]) -> None:
    """Put adapted layers into a model and freeze everything except their adapters and these modules."""
    model.freeze()
    for layer in layers.values():
        layer.train(model.training)
    model.update_modules(tree_unflatten(list(layers.items())))
    for module in modules.values():
        module.unfreeze()


def state_of(layers: Mapping[str, LoRALinear], modules: Mapping[str, nn.Module]) -> dict[str, mx.array]:
    """Return {name: array} of everything that an adapter file contains."""
    state = {f"{name}.{key}": array for name, layer in layers.items() for key, array in layer.adapter().items()}
    for name, module in modules.items():
        parameters: Any = tree_flatten(module.parameters())
        state |= {f"{name}.{key}": array for key, array in parameters}
    return state


def _find_adapted(model: MLXPreTrainedModel) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _peft_names(model: MLXPreTrainedModel) -> dict[str, str]:
    """Return {module name in PEFT's files: our name}. They differ where the model's dialect renames modules."""
    weights = {f"{name}.weight": name for name, _ in model.named_modules() if name}
    named = names_in(model.dialects[0], weights, model.config.num_hidden_layers, model.base_model_prefix)
    return {key.removesuffix(".weight"): name for key, name in named.items()}
