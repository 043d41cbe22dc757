"""What determines the result of a training, stored in its checkpoints and compared when it resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_esm_hf.modeling_utils import MLXPreTrainedModel

MOST_ITEMS = 10_000  # items of a data set that are compared: about half a second

# Fields of a config without an effect on a training.
DESCRIPTIVE = {
    "_name_or_path", "architectures", "dtype", "output_attentions", "output_hidden_states", "return_dict",
    "transformers_version",
}  # fmt: skip


def content(name: str, checksum: str) -> dict[str, str]:
    """Return the setting for something that has a name and a content, such as a file. Only the content is compared."""
    return {"name": name, "sha256": checksum}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a text, such as "rank: 8; now: 4", for each setting that has changed."""
    return [_difference(name, before.get(name), now[name]) for name in now if _differ(before.get(name), now[name])]


def config_settings(config: Any) -> dict[str, Any]:
    """Return the settings in a model's config, without a `problem_type` that its first loss has not set yet."""
    fields = json.loads(config.to_json_string(use_diff=False))
    if fields.get("problem_type") is None:
        fields.pop("problem_type", None)
    return {f"config.{name}": value for name, value in fields.items() if name not in DESCRIPTIVE}


def checksum_of_arrays(arrays: Mapping[str, mx.array]) -> str:
    """Return a checksum of the names, shapes, dtypes and elements of arrays."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype};".encode())
        digest.update(np.array(array.reshape(-1).view(mx.uint8)).data)
    return digest.hexdigest()


def checksum_of_model(model: MLXPreTrainedModel) -> str:
    """Return a checksum of the parameters that a model has from its checkpoint."""
    parameters: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    return checksum_of_arrays({k: array for k, array in parameters.items() if k not in model.newly_initialized})


def checksum_of_items(data: Any, columns: Iterable[str]) -> str | None:
    """Return a checksum of up to `MOST_ITEMS` items of a data set, evenly spread; None if its items are random.

    Args:
        data: the data set.
        columns: the columns of an item that a training uses.
    """
    if not len(data) or _bytes_of(data[0], columns) != _bytes_of(data[0], columns):
        return None
    digest = hashlib.sha256(str(len(data)).encode())
    for index in np.linspace(0, len(data) - 1, min(len(data), MOST_ITEMS)).round():
        digest.update(_bytes_of(data[int(index)], columns))
    return digest.hexdigest()


def _bytes_of(item: Mapping[str, Any], columns: Iterable[str]) -> bytes:
    """Return the values of an item, whatever type of array they are in."""
    values = {name: _plain(item[name]) for name in sorted(columns) if name in item}
    return json.dumps(values, default=repr).encode()


def _plain(value: Any) -> Any:
    return np.asarray(value).tolist() if hasattr(value, "shape") else value


def _differ(before: Any, now: Any) -> bool:
    if isinstance(before, dict) and isinstance(now, dict) and "sha256" in now:
        return before.get("sha256") != now["sha256"]
    return before != now


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict) and before.get("name") == now.get("name"):
        return f"{name}: other content" + (f" in {now['name']}" if now.get("name") else "")
    return f"{name}: {_text(before)}; now: {_text(now)}"


def _text(value: Any) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return value["name"] or "other content"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "not set" if value is None else str(value)
