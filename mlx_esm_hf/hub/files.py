"""Which files of a folder belong to its checkpoint, and whether that is whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_esm_hf.checkpoint.read import load_file
from mlx_esm_hf.checkpoint.resolve import shard_names, with_variant
from mlx_esm_hf.errors import CheckpointError

CONFIG = "config.json"
CARD = "README.md"
REPORT = "CONVERSION.md"  # what a conversion says of itself; it goes into the card
FIGURES = "CONVERSION.json"  # the numbers of that
TOKENIZER = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
OTHERS = (
    CONFIG,
    "generation_config.json",
    *TOKENIZER,
    CARD,
    REPORT,
    FIGURES,
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
)

WEIGHTS = re.compile(r"(?:model|pytorch_model)(?:\.(?P<variant>[\w.-]+?))?(?P<shard>-\d+-of-\d+)?\.(?:safetensors|bin)")
INDEX = re.compile(r"(?P<whole>model\.safetensors|pytorch_model\.bin)\.index(?:\.(?P<variant>[\w.-]+))?\.json")


@dataclass(frozen=True)
class Checkpoint:
    """What of a folder is a checkpoint.

    Attributes:
        config: the fields of its `config.json`.
        files: names of the files that belong to it.
        left_out: {name: why it does not}
        parameters: how many numbers its weights hold; None where they are pickles, or packed.
    """

    folder: Path
    config: dict[str, Any]
    files: list[str]
    left_out: dict[str, str]
    parameters: int | None


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Look through a folder.

    Raises:
        OSError: there is no such folder.
        CheckpointError: it holds no checkpoint, or not a whole one.
    """
    folder = Path(folder)
    names = sorted(entry.name for entry in folder.iterdir())
    config = read_config(folder)
    weights = [name for name in weights_that_are_read(folder, names) if (folder / name).is_file()]
    files = weights + [name for name in OTHERS if name in names and (folder / name).is_file()]
    left_out = {name: why_left_out(folder / name) for name in names if name not in files}
    return Checkpoint(folder, config, files, left_out, count_parameters(folder, weights, config))


def read_config(folder: Path) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: there is none, or it is not that of a model.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {CONFIG}: it is not a checkpoint. Nothing was sent.") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG} is not JSON ({error}). Nothing was sent.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(f"{folder / CONFIG} names no model_type: no one could load it. Nothing was sent.")
    return config


def variant_of(name: str) -> str | None:
    """The variant of a file of weights, or of their index, "" being the usual one; None for any other file."""
    match = WEIGHTS.fullmatch(name) or INDEX.fullmatch(name)
    return (match["variant"] or "") if match else None


def weights_that_are_read(folder: Path, names: list[str]) -> list[str]:
    """The weights that `from_pretrained` takes: safetensors before `.bin`, whole before sharded, of each variant.

    Raises:
        CheckpointError: there are none, or not all that an index names.
    """
    whole = [name for name in names if (match := WEIGHTS.fullmatch(name)) and not match["shard"]]
    indexes = [name for name in names if INDEX.fullmatch(name)]
    if any("safetensors" in name for name in whole + indexes):
        whole, indexes = ([name for name in found if "safetensors" in name] for found in (whole, indexes))
    files = list(whole)
    for index in indexes:
        match = INDEX.fullmatch(index)
        if match and with_variant(match["whole"], match["variant"]) not in whole:
            shards = shard_names(folder / index)
            if missing := [name for name in shards if name not in names]:
                raise CheckpointError(
                    f"{folder} lacks {', '.join(missing)}, which {index} names: it is not a whole checkpoint. Nothing "
                    "was sent."
                )
            files += [index, *shards]
    if not files:
        raise CheckpointError(f"{folder} holds no weights (model.safetensors, or shards with their index).")
    return files


def count_parameters(folder: Path, weights: Iterable[str], config: dict[str, Any]) -> int | None:
    """How many numbers the weights without a variant hold; each file is opened, its arrays are not read.

    Raises:
        CheckpointError: a file is cut off, or a shard has not what the index says.
    """
    total = 0
    index: dict[str, str] = {}
    for name in weights:
        if INDEX.fullmatch(name):
            index |= json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"]
    for name in weights:
        if not name.endswith(".safetensors"):
            continue
        arrays = load_file(folder / name)
        if lost := [key for key, shard in index.items() if shard == name and key not in arrays]:
            raise CheckpointError(
                f"{folder / name} lacks {lost[0]!r}, which the index says it holds. Nothing was sent."
            )
        if variant_of(name) == "":
            total += sum(array.size for array in arrays.values())
    return total if total and not is_quantized(config) else None


def is_quantized(config: dict[str, Any]) -> bool:
    """Whether the weights of a checkpoint with this config are quantized."""
    return bool(config.get("quantization") or config.get("quantization_config"))


def why_left_out(path: Path) -> str:
    """In a few words."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "a folder"
    if variant_of(path.name) is not None:
        return "weights that are not read: others come first, or no index names them"
    return "no part of a checkpoint"
