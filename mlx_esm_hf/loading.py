"""Turn a checkpoint's arrays into a model's parameters: read its config, match keys, check, assign and report."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.errors import StrictDataclassError
from mlx.utils import tree_flatten, tree_unflatten
from transformers import PreTrainedConfig
from transformers.utils.hub import resolve_revision

from mlx_esm_hf import ops
from mlx_esm_hf.checkpoint.names import canonical_names
from mlx_esm_hf.checkpoint.resolve import check_source, find_file
from mlx_esm_hf.dtypes import cast_error, name_of
from mlx_esm_hf.errors import CheckpointError, UserError, UserRuntimeError
from mlx_esm_hf.quantization.layers import QuantSpec, layers
from mlx_esm_hf.runtime.files import finish_replacing

logger = logging.getLogger(__name__)

Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]  # name, shape in the checkpoint, shape in the model


class Match(NamedTuple):
    """How a checkpoint's keys fit a model.

    Attributes:
        names: {key in the checkpoint: name of the parameter}.
        missing: parameters that the checkpoint lacks.
        unexpected: names that the model lacks.
        mismatched: parameters of another shape.
    """

    names: dict[str, str]
    missing: set[str]
    unexpected: set[str]
    mismatched: set[Mismatch]


# Config


def commit_of(source: str, revision: str = "main", **hub: Any) -> Any:
    """Resolve a revision to its current commit, huggingface_hub's `ResolvedRevision`.

    A revision that cannot be resolved, or is already resolved, is returned unchanged.

    Args:
        source: Hub id or folder.
        revision: branch, tag or commit.
        hub: the arguments of `find_file`.

    Raises:
        OSError: the source is a folder that is not found.
    """
    check_source(source)
    where = {name: hub[name] for name in ("token", "cache_dir", "local_files_only") if name in hub}
    return resolve_revision(source, revision, **where)


def read_config(source: str, **hub: Any) -> dict[str, Any]:
    """Read the fields of a checkpoint's `config.json`.

    Args:
        source: Hub id or folder.
        hub: the arguments of `find_file`.

    Raises:
        OSError: the file is missing, empty or not JSON; or what `find_file` raises.
        ValueError: the file is JSON, but not an object.
    """
    finish_replacing(os.path.join(source, hub.get("subfolder") or ""))
    hub["revision"] = commit_of(source, **hub)
    # If the revision is unresolved, transformers' call below explains why the repository or revision is missing.
    if hasattr(hub["revision"], "resolved"):
        find_file(source, "config.json", **hub)  # compares checksums, which transformers does not
        hub["force_download"] = False
    config_dict: Any
    try:
        config_dict, _ = PreTrainedConfig.get_config_dict(source, **hub)
    except TypeError:  # transformers indexes whatever JSON it finds
        config_dict = "not an object"
    if config_dict and not isinstance(config_dict, dict):
        raise UserError(f"The config.json of {source} must be a JSON object with the config's fields.")
    if not config_dict:
        place = os.path.join(source, hub["subfolder"]) if hub.get("subfolder") else source
        raise OSError(f"No config.json found in {place}, or it is empty. Pass the checkpoint's config as config=.")
    config_dict["_name_or_path"] = source
    return config_dict


def load_config(
    cls: Any, source: PreTrainedConfig | str | os.PathLike[str], overrides: dict[str, Any], **hub: Any
) -> tuple[Any, dict[str, Any]]:
    """Load a checkpoint's config, or copy the given one, and apply overrides.

    Args:
        cls: the model class.
        source: a config, a Hub id or a folder.
        overrides: config fields, and keyword arguments of the class.
        hub: the arguments of `find_file`.

    Returns:
        The config, and those of `overrides` that are arguments of the class.

    Raises:
        ValueError: the config has values that transformers refuses.
        TypeError: an override is neither a config field nor an argument of the class.
    """
    config_dict = source.to_dict() if isinstance(source, PreTrainedConfig) else read_config(str(source), **hub)
    try:
        config, others = cls.config_class.from_dict(config_dict, return_unused_kwargs=True, **overrides)
    except (StrictDataclassError, AttributeError, TypeError, ValueError) as error:  # transformers, on odd values
        reason = " ".join(str(error).split())
        raise UserError(f"The config of {config_dict.get('_name_or_path') or 'this model'}: {reason}") from error
    if unknown := others.keys() - inspect.signature(cls.__init__).parameters.keys():
        raise TypeError(
            f"from_pretrained has no argument {', '.join(map(repr, unknown))}, and the config has no such field."
        )
    return config, others


# Checks before a model is built


def check_size(
    cls: Any,
    config: Any,
    names: dict[str, str],
    arrays: dict[str, mx.array],
    specs: dict[str, QuantSpec],
    source: str,
) -> None:
    """Compare the config's depth and width with the checkpoint before building a model, which could be of any size.

    Raises:
        CheckpointError: the config has more layers than the checkpoint.
        RuntimeError: the config has another width than the checkpoint's embedding table.
    """
    numbers = [int(part) for name in names.values() for part in name.split(".") if part.isdecimal()]
    config = cls.language_config(config)
    if numbers and config.num_hidden_layers > max(numbers) + 1:
        raise CheckpointError(
            f"{source}: the config has {config.num_hidden_layers} layers, the checkpoint {max(numbers) + 1}. The "
            "checkpoint is incomplete, or its config.json belongs to another one."
        )
    table = f"{cls.input_embeddings}.weight"
    for key, name in names.items():
        if name.removeprefix(f"{cls.base_model_prefix}.") == table:
            shape = arrays[key].shape
            if spec := specs.get(cls.input_embeddings):
                shape = (*shape[:-1], shape[-1] * 32 // spec.bits)
            if shape[-1] != config.hidden_size:
                expected = (config.vocab_size, config.hidden_size)
                raise UserRuntimeError(shape_error(source, cls.__name__, {(name, shape, expected)}))


def untie_if_different(cls: Any, config: Any, names: dict[str, str], arrays: dict[str, mx.array]) -> None:
    """Untie the output projection in the config, as transformers does, if it differs from the embeddings."""
    keys = {name: key for key, name in names.items()}
    for tied, source in cls.tied_weights().items():
        bare = source.removeprefix(f"{cls.base_model_prefix}.")
        if not config.tie_word_embeddings or tied not in keys or not {source, bare} & keys.keys():
            continue
        head, table = arrays[keys[tied]], arrays[keys.get(source) or keys[bare]]
        if head.shape != table.shape or not mx.array_equal(head, table):
            logger.warning(
                "The config ties %s to %s, but the checkpoint has different values for them, so they are not tied. "
                "Set tie_word_embeddings=False to silence this warning.",
                tied,
                source,
            )
            config.tie_word_embeddings = False


# Match and assign


def match(model: Any, arrays: Mapping[str, mx.array]) -> Match:
    """Match a checkpoint's keys, in any dialect of the model's class, with the model's parameters."""
    held = dict(tree_flatten(model.parameters()))
    names = canonical_names(arrays, held, model.base_model_prefix, model.dialects, model.tied_weights())
    missing = {name for name in held.keys() - names.values() if not name.endswith(model.buffers)}
    mismatched = {
        (name, arrays[key].shape, held[name].shape)
        for key, name in names.items()
        if name in held and arrays[key].shape != held[name].shape
    }
    return Match(names, missing, names.values() - held.keys(), mismatched)


def assign(
    model: Any,
    arrays: dict[str, mx.array],
    dtype: mx.Dtype,
    source: str,
    *,
    ignore_mismatched_sizes: bool,
    lazy: bool,
    keep_scales: bool,
) -> Match:
    """Make a checkpoint's arrays the parameters of a model.

    Args:
        model: an `MLXPreTrainedModel`.
        arrays: {key: array}; emptied on the way. Each array is removed before it is read and cast, so that memory never
            holds a second copy of the checkpoint.
        dtype: dtype of the parameters.
        source: Hub id or folder, for messages.
        ignore_mismatched_sizes: initialize parameters of another shape instead of raising.
        lazy: leave arrays unread.
        keep_scales: keep the dtype of the scales of quantized linear layers. Embeddings always get `dtype`: they set
            the dtype of the network.

    Raises:
        RuntimeError: parameters of another shape.
        CheckpointError: required parameters are missing, or an array cannot be read or cast.
    """
    matched = match(model, arrays)
    names, missing, unexpected, mismatched = matched
    if mismatched and not ignore_mismatched_sizes:
        raise UserRuntimeError(shape_error(source, type(model).__name__, mismatched))
    prefix = f"{model.base_model_prefix}."
    if holes := sorted(name for name in missing if name.removeprefix(prefix).startswith(model.required)):
        raise CheckpointError(
            f"{source} lacks {len(holes)} parameters that {type(model).__name__} requires, such as {holes[0]!r}. The "
            "checkpoint is incomplete, or its config.json belongs to another one."
        )

    refuse_unlike_scales(names, arrays, source)
    initialized = missing | {name for name, _, _ in mismatched}
    held = dict(tree_flatten(model.parameters()))
    quantized = [path for path, layer in layers(model) if isinstance(layer, nn.QuantizedLinear)] if keep_scales else []
    kept = {f"{path}.{name}" for path in quantized for name in ("scales", "biases")}
    for key, name in names.items():
        array = stored = arrays.pop(key)
        if name in unexpected or name in initialized:
            continue
        if reason := cast_error(array.dtype, held[name].dtype):
            raise CheckpointError(f"{source}: {key!r} {reason}. The file is damaged, or belongs to another model.")
        if model.is_cast(name, array) and name not in kept:
            array = array.astype(model.loaded_dtype(name, dtype))
        try:
            if not lazy and mx.issubdtype(array.dtype, mx.floating) and squares_overflow(array):
                raise CheckpointError(f"{source}: {unusable(key, array, stored)}")
            if not lazy:
                mx.eval(array)
        except RuntimeError as error:
            raise CheckpointError(f"{source}: {key!r} cannot be read ({error}). Download it again.") from error
        model.update(tree_unflatten([(name, array)]))
    for name in initialized:
        if model.is_cast(name, held[name]):
            model.update(tree_unflatten([(name, held[name].astype(model.loaded_dtype(name, dtype)))]))
    if not lazy:
        mx.eval(model.parameters())
    model.config.dtype = name_of(dtype)
    model.set_newly_initialized(initialized)
    return matched


def refuse_unlike_scales(names: Mapping[str, str], arrays: Mapping[str, mx.array], source: str) -> None:
    """Check that the scales and biases of each quantized layer have the same dtype, as MLX needs.

    Args:
        names: {key: name of the parameter}.
        arrays: {key: array}.
        source: Hub id or folder, for messages.

    Raises:
        CheckpointError: they have different dtypes.
    """
    keys = {name: key for key, name in names.items()}
    for name, key in keys.items():
        scales = keys.get(f"{name.removesuffix('.biases')}.scales")
        if not (name.endswith(".biases") and scales and mx.issubdtype(arrays[scales].dtype, mx.floating)):
            continue
        if arrays[scales].dtype != arrays[key].dtype:
            found = f"{scales!r} has dtype {name_of(arrays[scales].dtype)}, {key!r} {name_of(arrays[key].dtype)}"
            raise CheckpointError(f"{source}: {found}; must be the same. Convert the checkpoint again.")


# Unusable parameters


def squares_overflow(array: mx.array) -> mx.array:
    """Return whether an array has NaN, infinity or a value whose square overflows float32, as a lazy scalar.

    Layer norms square the values. One sum reads the array once, which is cheaper than `mx.isfinite`.
    """
    return mx.logical_not(mx.isfinite(ops.sum_of_squares(array.astype(mx.float32))))


def unusable_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are infinite or NaN, or whose squares overflow."""
    named: Any = tree_flatten(model.parameters())
    found = {name: squares_overflow(x) for name, x in named if mx.issubdtype(x.dtype, mx.floating)}
    mx.eval(found)
    return [name for name, overflows in found.items() if overflows]


def unusable(name: str, array: mx.array, stored: mx.array) -> str:
    """Return what is wrong with a parameter that `squares_overflow`, and what to do.

    Args:
        name: its name, for the message.
        array: its values.
        stored: the values in the checkpoint, of which `array` is a cast.
    """
    bad, bad_stored = (int(mx.logical_not(mx.isfinite(x)).sum()) for x in (array, stored))
    largest = f"{mx.abs(stored.astype(mx.float32)).max().item():.4g}"
    if bad > bad_stored:
        return (
            f"{name!r} has values up to {largest}, which overflow in {name_of(array.dtype)}. Use float32, or bfloat16."
        )
    if bad:
        what = f"{bad:,} of its {array.size:,} values are NaN or infinite"
    else:
        what = f"it has values up to {largest}, whose squares overflow"
    return f"{name!r} is damaged: {what}. Download the checkpoint again, or choose another one."


# Reports


def shape_lines(mismatched: set[Mismatch]) -> str:
    """Return one line for each parameter of another shape."""
    return "\n".join(f"  {name}: {a} in the checkpoint, {b} in the model" for name, a, b in sorted(mismatched))


def shape_error(source: str, model: str, mismatched: set[Mismatch]) -> str:
    """Return the error message for a checkpoint whose shapes are not the model's."""
    return (
        f"Shapes differ between {source} and {model}:\n{shape_lines(mismatched)}\nLoad it with the config that belongs "
        "to it, or pass ignore_mismatched_sizes=True to initialize these parameters."
    )


def report_loading(model: str, source: str, matched: Match) -> None:
    """Log keys that did not fit, in the form of transformers' load report."""
    notes = {
        "UNEXPECTED": "can be ignored when loading from another task or architecture.",
        "MISSING": "newly initialized because the checkpoint lacks them: train them on your task.",
        "MISMATCH": "newly initialized because the checkpoint has them in another shape.",
    }
    rows = [(name, "UNEXPECTED", "") for name in sorted(matched.unexpected)]
    rows += [(name, "MISSING", "") for name in sorted(matched.missing)]
    rows += [(name, "MISMATCH", f"{a} in the checkpoint, {b} here") for name, a, b in sorted(matched.mismatched)]
    if rows:
        width = max(len(name) for name, _, _ in rows)
        table = "\n".join(f"{name:{width}} | {status:10} | {detail}".rstrip(" |") for name, status, detail in rows)
        statuses = dict.fromkeys(status for _, status, _ in rows)
        legend = "\n".join(f"- {status}: {notes[status]}" for status in statuses)
        logger.warning("%s LOAD REPORT from: %s\n%s\n%s", model, source, table, legend)
