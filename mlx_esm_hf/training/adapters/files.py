"""Adapter files in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`; besides them `labels.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import mlx.core as mx
from transformers.utils.hub import resolve_revision

from mlx_esm_hf.checkpoint.names import canonical_names, names_in
from mlx_esm_hf.checkpoint.read import load_file
from mlx_esm_hf.checkpoint.resolve import check_source, find_file
from mlx_esm_hf.checkpoint.write import write_safetensors
from mlx_esm_hf.demo import shown_name
from mlx_esm_hf.errors import CheckpointError, UserError
from mlx_esm_hf.runtime.files import replace_files
from mlx_esm_hf.training.adapters.config import LoraConfig, json_object, read_adapter_config
from mlx_esm_hf.training.adapters.model import (
    adapted_layers,
    check_no_adapters,
    choose_layers,
    insert,
    modules_to_save,
    state_of,
    tie_again,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TORCH_WEIGHTS = "adapter_model.bin"
# Labels of a classifier, for which PEFT has no place: it ignores fields of its config that it does not know, with a
# warning, and transformers takes a folder with a config.json for a whole model.
LABELS = "labels.json"
LABEL_FIELDS = ("id2label", "label2id", "problem_type")
PREFIX = "base_model.model."  # of all keys in PEFT's files
# Names of the last layer of classifiers.
CLASSIFIERS = tuple(f"{PREFIX}{name}.weight" for name in ("classifier.out_proj", "classifier", "score"))
COPIES = (".modules_to_save.", ".original_module.")


class Base(NamedTuple):
    """The base model of an adapter.

    Attributes:
        source: Hub id or folder.
        revision: branch, tag or commit.
        labels: config fields of the adapter's classifier, such as `num_labels`; empty if it has none.
        adapter: Hub id or folder of the adapter, for messages.
    """

    source: str
    revision: str
    labels: dict[str, Any]
    adapter: str

    def resolve(self, hub: Mapping[str, Any]) -> Any:
        """Return the resolved revision of the base model.

        Raises:
            OSError: the base model is not found.
        """
        where = {name: hub[name] for name in ("token", "cache_dir", "local_files_only") if name in hub}
        try:
            check_source(self.source)
            return resolve_revision(self.source, self.revision, **where)
        except OSError as error:
            raise OSError(
                f"{self.adapter} is an adapter of {self.source}, which cannot be loaded ({error}) Load the base model "
                f"from another place, then load_adapter(model, {self.adapter!r})."
            ) from error


def base_of(source: str, *, subfolder: str = "", **hub: Any) -> Base | None:
    """Return the base model of a folder or repository that holds an adapter and no model; None for others.

    Args:
        source: Hub id or folder.
        subfolder: folder of the files in it.
        hub: the other arguments of `find_file`.

    Raises:
        CheckpointError: the adapter does not name its base model.
    """
    if not os.path.isdir(source) and not hasattr(hub.get("revision"), "resolved"):
        return None  # reading the config explains why
    place = hub | {"subfolder": subfolder}
    # With `force_download`, looking for the config would download it twice.
    if not hub.get("force_download") and find_file(source, "config.json", **place) is not None:
        return None
    config_file = find_file(source, CONFIG, **place)
    if config_file is None or find_file(source, "config.json", **place | {"force_download": False}) is not None:
        return None
    found = json_object(config_file)
    name = found.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{config_file} does not name its base model (base_model_name_or_path). Load the base model, then "
            f"load_adapter(model, {source!r})."
        )
    rows = _num_labels(load_file(find_weights(source, subfolder=subfolder, **hub)))
    labels = {} if rows is None else {"num_labels": rows}
    if labels and (labels_file := find_file(source, LABELS, **place)) is not None:
        stored = _read_labels(labels_file)
        if len(stored["id2label"]) == rows:  # otherwise PEFT has replaced the adapter
            labels |= stored
    return Base(name, found.get("revision") or "main", labels, source)


def _num_labels(arrays: Mapping[str, mx.array]) -> int | None:
    """Return the rows of the last layer of a classifier, in the order of their keys."""
    found = [x for key, x in arrays.items() if key.endswith((*CLASSIFIERS,)) and "lora_" not in key]
    return len(found[0]) if found else None


def _read_labels(path: str) -> dict[str, Any]:
    """Return the config fields in a `labels.json`.

    Raises:
        CheckpointError: it does not map numbers to names.
    """
    found = json_object(path)
    try:
        names = {int(number): name for number, name in found["id2label"].items()}
    except (KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{path} must contain `id2label`, a dictionary from numbers to names. Remove the file to load the adapter "
            "without names."
        ) from error
    return {name: found[name] for name in LABEL_FIELDS if name in found} | {"id2label": names}


def find_weights(source: str, **hub: Any) -> str:
    """Return the path of the weights of an adapter; arguments as in `find_file`.

    Raises:
        OSError: they are not found.
    """
    files = (find_file(source, name, **hub) for name in (WEIGHTS, TORCH_WEIGHTS))
    if weights := next((file for file in files if file is not None), None):
        return weights
    raise OSError(f"{WEIGHTS} or {TORCH_WEIGHTS} not found in {source}: there are no weights to load.")


def save_adapter(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write the adapters and the modules to save in PEFT's layout. The files appear complete or not at all.

    The labels of a classifier are written to `labels.json`, which PEFT ignores and `from_pretrained` reads.

    Raises:
        ValueError: the model has no adapters.
        OSError: the folder cannot be written.
    """
    layers = adapted_layers(model)
    config = next(iter(layers.values())).config
    modules = modules_to_save(model, config)
    depth = model.language_config(model.config).num_hidden_layers
    state = names_in(model.dialects[0], state_of(model, layers, modules), depth, model.base_model_prefix)
    written = asdict(config) | {
        "peft_type": "LORA",
        "base_model_name_or_path": shown_name(model.config._name_or_path) or None,
        "modules_to_save": config.trained_modules or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    arrays = {PREFIX + name: array for name, array in state.items()}
    texts = {CONFIG: written}
    if _num_labels(arrays) is not None:
        texts[LABELS] = {name: getattr(model.config, name) for name in LABEL_FIELDS}
    with replace_files(folder, [LABELS]) as temporary:
        write_safetensors(temporary / WEIGHTS, arrays)
        for name, fields in texts.items():
            text = json.dumps(fields, indent=2, sort_keys=True)
            (temporary / name).write_text(text + "\n", encoding="utf-8")


def load_adapter(
    model: Any,
    folder_or_repo: str | os.PathLike[str],
    *,
    revision: str = "main",
    subfolder: str = "",
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    skip_other_heads: bool = False,
) -> Any:
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
        skip_other_heads: leave out the parts of the adapter that the model does not have, such as the classifier.

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
    weights = find_weights(source, subfolder=subfolder, **hub)

    config = read_adapter_config(config_file)
    arrays = {key.removeprefix(PREFIX): array for key, array in load_file(weights).items()}
    # PEFT may write modules to save once more, and those of the base model.
    arrays = {key: array for key, array in arrays.items() if not any(copy in key for copy in COPIES)}
    if skip_other_heads:
        config, arrays = _without_other_heads(model, config, arrays)
    was_tied = model.is_tied()
    try:
        layers, modules = choose_layers(model, config)
    except ValueError as error:
        raise CheckpointError(f"{config_file}: {error}") from error
    expected = state_of(model, layers, modules)
    names = canonical_names(arrays, expected, model.base_model_prefix, model.dialects, {})
    try:
        _check_fit(model, arrays, names, expected, weights)
        mx.eval(arrays)
        _match_vocabulary(model, {name: arrays[key] for key, name in names.items()})
    except (CheckpointError, UserError):
        if was_tied:
            tie_again(model)
        raise
    insert(model, layers, modules)
    model.load_state_dict(arrays, strict=False)
    return model


def _without_other_heads(
    model: Any, config: LoraConfig, arrays: dict[str, mx.array]
) -> tuple[LoraConfig, dict[str, mx.array]]:
    """Return config and arrays without modules to save, outside the base model, that a model does not have."""
    names = config.trained_modules
    kept = [n for n in names if modules_to_save(model, replace(config, modules_to_save=[n], task_type=None))]
    heads = {name.split(".")[0] for name in names if name not in kept}
    arrays = {key: array for key, array in arrays.items() if key.split(".")[0] not in heads}
    return replace(config, modules_to_save=kept, task_type=None), arrays


def _tables(model: Any) -> list[str]:
    """Return the names of the embedding table and of the output projection's weight."""
    pairs = model.tied_weights()
    return [*pairs, *pairs.values()] if pairs else [_embedding_name(model)]


def _embedding_name(model: Any) -> str:
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return f"{prefix}{model.input_embeddings}.weight"


def _match_vocabulary(model: Any, arrays: Mapping[str, mx.array]) -> None:
    """Resize the vocabulary to that of the file, which PEFT writes if it was resized, and untie a model if needed.

    Raises:
        UserError: the vocabulary is quantized and cannot be resized.
    """
    tables = [arrays[name] for name in _tables(model) if name in arrays]
    if not tables:
        return
    if len(tables[0]) != model.config.vocab_size:
        model.resize_token_embeddings(len(tables[0]))
    if model.is_tied() and not all(mx.array_equal(tables[0], table) for table in tables):
        model.untie_weights()


def _check_fit(
    model: Any,
    arrays: Mapping[str, mx.array],
    names: Mapping[str, str],
    expected: Mapping[str, mx.array],
    path: str,
) -> None:
    """Raise CheckpointError unless the arrays are those of the adapter that the config describes.

    Tables of the vocabulary may be there in addition, and with another number of rows; see `_match_vocabulary`.
    """
    tables = [(name, arrays[key].shape) for key, name in names.items() if name in _tables(model)]
    if len({shape[0] for _, shape in tables}) > 1:
        raise CheckpointError(f"{path}: the tables of the vocabulary differ in size: {tables}.")
    table = model.get_input_embeddings().weight
    if missing := sorted(expected.keys() - names.values()):
        raise CheckpointError(
            f"{path} is missing {len(missing)} of the adapter's arrays, such as {missing[0]!r}. It is incomplete, or "
            f"its {CONFIG} belongs to another adapter, or it was made for another model than {type(model).__name__}."
        )
    for key, name in names.items():
        is_table = name in _tables(model)
        if name not in expected and not is_table:
            raise CheckpointError(
                f"{path} contains {key!r}, which is neither in the adapter that its {CONFIG} describes nor in its "
                f"modules_to_save. It was made for another model than {type(model).__name__}, or with other settings."
            )
        shape = table.shape if is_table else expected[name].shape
        same = arrays[key].shape[is_table:] == shape[is_table:]
        if not same or not mx.issubdtype(arrays[key].dtype, mx.floating):
            raise CheckpointError(
                f"{path}: expected {key!r} of {type(model).__name__} to be floating point of shape {shape}, got "
                f"{arrays[key].dtype} of shape {arrays[key].shape}."
            )
