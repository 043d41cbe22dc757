"""Adapters in a model: choose its layers, add adapters and merge them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_esm_hf.checkpoint.names import names_in
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_layers import Linear, QuantizedLinear, module_at
from mlx_esm_hf.quantization.layers import spec_of
from mlx_esm_hf.training.adapters.config import ALL_LINEAR, LoraConfig, has_suffix
from mlx_esm_hf.training.adapters.layer import LoRALinear


def add_adapters(model: Any, config: Any) -> Any:
    """Freeze a model and add trainable adapters to it, in place.

    New adapters do not change the outputs, since B is zero. The modules to save are trainable as well.
    `model.print_trainable_parameters()` counts both.

    If the embedding table or the output projection of a tied model is trained, the model gets a projection of its own,
    as in PEFT, where the copy of one does not reach the other.

    Args:
        model: the model.
        config: a `LoraConfig`, ours or PEFT's.

    Returns:
        The model.

    Raises:
        ValueError: the model already has adapters, no module has such a name, a module is not a linear layer, or PEFT's
            configuration is not supported.
    """
    check_no_adapters(model)
    if not isinstance(config, LoraConfig):
        config = LoraConfig.from_peft(config)
    layers, modules = choose_layers(model, config)
    insert(model, layers, modules)
    return model


def merge_adapters(model: Any) -> Any:
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


def has_adapters(model: Any) -> bool:
    """Return whether a model has adapters."""
    return bool(_find_adapted(model))


def check_no_adapters(model: Any) -> None:
    """Raise UserError if a model has adapters."""
    if has_adapters(model):
        raise UserError(
            f"{type(model).__name__} already has adapters: merge them (merge_adapters) before adding others."
        )


def adapted_layers(model: Any) -> dict[str, LoRALinear]:
    """Return {name: adapted layer} of a model.

    Raises:
        UserError: it has no adapters.
    """
    if not (layers := _find_adapted(model)):
        raise UserError(f"{type(model).__name__} has no adapters: call add_adapters or load_adapter first.")
    return layers


def modules_to_save(model: Any, config: LoraConfig) -> dict[str, nn.Module]:
    """Return {our name: module} of the modules that are trained and saved in full."""
    chosen = {ours for theirs, ours in _peft_names(model).items() if has_suffix(theirs, config.trained_modules)}
    return {name: module for name, module in model.named_modules() if name in chosen}


def choose_layers(model: Any, config: LoraConfig) -> tuple[dict[str, LoRALinear], dict[str, nn.Module]]:
    """Return {name: adapted layer} to insert and {name: module} to save.

    The model stays as it is, but a tied one is untied if its embedding table or output projection is trained.

    Raises:
        UserError: the configuration does not fit the model.
    """
    if not model.is_tied() or spec_of(model.get_input_embeddings()):
        layers, modules = _choose_layers(model, config)
        if plain := [name for name in layers if name.startswith(model.plain)]:
            raise UserError(
                f"{plain[0]} cannot have an adapter: the operations of folding read plain weights. Choose layers of "
                "the language model in target_modules."
            )
        return layers, modules
    model.untie_weights()
    try:
        layers, modules = _choose_layers(model, config)
        if _trains_vocabulary(model, [*layers, *modules]):
            if config.ensure_weight_tying:
                raise UserError(
                    "ensure_weight_tying=True is not supported for an embedding table or output projection that is "
                    "trained. Leave it out, or train without adapters."
                )
            return layers, modules
    except UserError:
        tie_again(model)
        raise
    tie_again(model)
    return layers, modules


def tie_again(model: Any) -> None:
    """Undo `untie_weights` of a model whose weights have not changed since."""
    model.config.tie_word_embeddings = model.base_model.config.tie_word_embeddings = True
    model.tie_weights()


def _trains_vocabulary(model: Any, names: Sequence[str]) -> bool:
    """Return whether modules of these names are or contain the embedding table or the output projection."""
    tables = [f"{path}.weight" for pair in model.tied_weights().items() for path in map(_module_of, pair)]
    return any(table.startswith(f"{name}.") for table in tables for name in names)


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _choose_layers(model: Any, config: LoraConfig) -> tuple[dict[str, LoRALinear], dict[str, nn.Module]]:
    all_modules = dict(model.named_modules())
    modules = modules_to_save(model, config)
    if config.trained_modules and not modules:
        names = ", ".join(name for name, _ in model.named_children())
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
        if not wanted or config.excludes(theirs) or f"{name}.".startswith(saved_prefixes):
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
        left = " that is not excluded" if config.exclude_modules or config.layer_numbers else ""
        raise UserError(
            f"target_modules={config.target_modules!r}: no such linear layer{left} found in {type(model).__name__}. It "
            f"has (N is a number): {', '.join(known)}."
        )
    return layers, modules


def insert(model: Any, layers: Mapping[str, LoRALinear], modules: Mapping[str, nn.Module]) -> None:
    """Put adapted layers into a model and freeze everything except their adapters, these modules and chosen biases."""
    model.freeze()
    for layer in layers.values():
        layer.train(model.training)
    model.update_modules(tree_unflatten(list(layers.items())))
    for module in modules.values():
        module.unfreeze()
    for name in _trained_biases(model, layers):
        module_at(model, _module_of(name)).unfreeze(recurse=False, keys="bias")


def state_of(model: Any, layers: Mapping[str, LoRALinear], modules: Mapping[str, nn.Module]) -> dict[str, mx.array]:
    """Return {name: array} of everything that an adapter file contains. The layers may be inserted or not."""
    state = {f"{name}.{key}": array for name, layer in layers.items() for key, array in layer.adapter().items()}
    for name, module in modules.items():
        parameters: Any = tree_flatten(module.parameters())
        state |= {f"{name}.{key}": array for key, array in parameters}
    return _trained_biases(model, layers) | state


def _trained_biases(model: Any, layers: Mapping[str, LoRALinear]) -> dict[str, mx.array]:
    """Return {name: array} of the biases that are trained besides adapters and modules to save."""
    config = next(iter(layers.values())).config
    of_layers = {f"{name}.base_layer.bias": layer.bias for name, layer in layers.items() if layer.bias is not None}
    if config.bias == "none":
        return {}
    if config.bias == "lora_only":
        return of_layers
    replaced = {f"{name}.bias" for name in layers}
    parameters = model.named_parameters()
    return of_layers | {name: x for name, x in parameters if name.endswith(".bias") and name not in replaced}


def _find_adapted(model: Any) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _peft_names(model: Any) -> dict[str, str]:
    """Return {module name in PEFT's files: our name}. They differ where the model's dialect renames modules."""
    weights = {f"{name}.weight": name for name, _ in model.named_modules() if name}
    layers = model.language_config(model.config).num_hidden_layers
    named = names_in(model.dialects[0], weights, layers, model.base_model_prefix)
    return {key.removesuffix(".weight"): name for key, name in named.items()}
