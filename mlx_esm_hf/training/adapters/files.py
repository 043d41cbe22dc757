"""Adapter files in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import mlx.core as mx
from transformers.utils.hub import resolve_revision

from mlx_esm_hf.checkpoint.names import canonical_names, names_in
from mlx_esm_hf.checkpoint.read import load_file
from mlx_esm_hf.checkpoint.resolve import find_file
from mlx_esm_hf.checkpoint.write import write_safetensors
from mlx_esm_hf.demo import shown_name
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.runtime.files import replace_files
from mlx_esm_hf.training.adapters.config import read_adapter_config
from mlx_esm_hf.training.adapters.model import (
    adapted_layers,
    check_no_adapters,
    choose_layers,
    insert,
    modules_to_save,
    state_of,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TORCH_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."  # of all keys in PEFT's files


def save_adapter(model: MLXPreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Write the adapters and the modules to save in PEFT's layout. The files appear complete or not at all.

    Raises:
        ValueError: the model has no adapters.
        OSError: the folder cannot be written.
    """
    layers = adapted_layers(model)
    config = next(iter(layers.values())).config
    modules = modules_to_save(model, config)
    state = names_in(
        model.dialects[0], state_of(layers, modules), model.config.num_hidden_layers, model.base_model_prefix
    )
    written = asdict(config) | {
        "peft_type": "LORA",
        "base_model_name_or_path": shown_name(model.config._name_or_path) or None,
        "modules_to_save": config.trained_modules or None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if not isinstance(config.target_modules, str):
        written["target_modules"] = list(config.target_modules)
    with replace_files(folder) as temporary:
        write_safetensors(temporary / WEIGHTS, {PREFIX + name: array for name, array in state.items()})
        text = json.dumps(written, indent=2, sort_keys=True)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")


def load_adapter(
    model: MLXPreTrainedModel,
    folder_or_repo: str | os.PathLike[str],
    *,
    revision: str = "main",
    subfolder: str = "",
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> MLXPreTrainedModel:
    """Add the adapters that `save_adapter` or PEFT has written. They are trainable, everything else is frozen.

    A model in evaluation mode stays in it.

    Args:
        model: the base model, changed in place.
        folder_or_repo: a folder, or an id on the Hub.
        revision: branch, tag or commit on the Hub.
        subfolder: folder of the repository that contains the files.
        cache_dir: folder of downloaded files; by default that of huggingface_hub.
        token: access token of the Hub.
        local_files_only: read from the cache only.
        force_download: download again.

    Returns:
        The model.

    Raises:
        OSError: the repository or file is not found, or there is no network and the cache does not contain it.
        CheckpointError: the file is damaged, is not LoRA or DoRA, or does not fit the model. The model is unchanged.
        ValueError: the model already has adapters.
    """
    check_no_adapters(model)
    source = str(folder_or_repo)
    hub: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    hub |= {"revision": resolve_revision(source, revision, **hub), "force_download": force_download}
    config_file = find_file(source, CONFIG, subfolder=subfolder, **hub)
    if config_file is None:
        raise OSError(f"{CONFIG} not found in {source}: there is no adapter to load.")
    files = (find_file(source, name, subfolder=subfolder, **hub) for name in (WEIGHTS, TORCH_WEIGHTS))
    weights = next((file for file in files if file is not None), None)
    if weights is None:
        raise OSError(f"{WEIGHTS} or {TORCH_WEIGHTS} not found in {source}: there are no weights to load.")

    config = read_adapter_config(config_file)
    arrays = {key.removeprefix(PREFIX): array for key, array in load_file(weights).items()}
    try:
        layers, modules = choose_layers(model, config)
    except ValueError as error:
        raise CheckpointError(f"{config_file}: {error}") from error
    _check_fit(model, arrays, state_of(layers, modules), weights)
    mx.eval(arrays)
    insert(model, layers, modules)
    model.load_state_dict(arrays, strict=False)
    return model


def _check_fit(
    model: MLXPreTrainedModel, arrays: Mapping[str, mx.array], expected: Mapping[str, mx.array], path: str
) -> None:
    """Raise CheckpointError unless the arrays are those of the adapter that the config describes."""
    names = canonical_names(arrays, expected, model.base_model_prefix, model.dialects, {})
    if missing := sorted(expected.keys() - names.values()):
        raise CheckpointError(
            f"{path} is missing {len(missing)} of the adapter's arrays, such as {missing[0]!r}. It is incomplete, or "
            f"its {CONFIG} belongs to another adapter, or it was made for another model than {type(model).__name__}."
        )
    for key, name in names.items():
        if name in model.tied_weights() and name not in expected:
            raise CheckpointError(
                f"{path} contains {key!r}, a copy of the embedding that was trained separately, but the model shares "
                "one array for both: load it with tie_word_embeddings=False."
            )
        if name not in expected:
            raise CheckpointError(
                f"{path} contains {key!r}, which is neither in the adapter that its {CONFIG} describes nor in its "
                f"modules_to_save. It was made for another model than {type(model).__name__}, or with other settings."
            )
        if arrays[key].shape != expected[name].shape or not mx.issubdtype(arrays[key].dtype, mx.floating):
            raise CheckpointError(
                f"{path}: expected {key!r} of {type(model).__name__} to be floating point of shape "
                f"{expected[name].shape}, got {arrays[key].dtype} of shape {arrays[key].shape}."
            )
