"""The files of a folder that belong to its checkpoint, and checks that they are complete."""

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
from mlx_esm_hf.runtime.files import finish_replacing

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
CARD = "README.md"
REPORT = "CONVERSION.md"  # the report of a conversion, which becomes part of the card
FIGURES = "CONVERSION.json"  # the figures of that report
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
    """The checkpoint in a folder.

    Attributes:
        folder: the folder.
        config: the fields of `config.json`.
        files: names of the files that belong to the checkpoint.
        left_out: {name: reason} of the other files.
        parameters: number of parameters; None if the weights are pickles or quantized.
    """

    folder: Path
    config: dict[str, Any]
    files: list[str]
    left_out: dict[str, str]
    parameters: int | None


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Find the checkpoint in a folder and check it.

    Raises:
        OSError: the folder does not exist.
        CheckpointError: the folder contains no checkpoint, or an incomplete one, or a file is a link out of the folder.
    """
    folder = Path(folder)
    finish_replacing(folder)
    names = sorted(entry.name for entry in folder.iterdir())
    refuse_links(folder, [name for name in names if name in OTHERS or variant_of(name) is not None])
    config = read_config(folder)
    weights = [name for name in loaded_weights(folder, names) if (folder / name).is_file()]
    files = weights + [name for name in OTHERS if name in names and (folder / name).is_file()]
    left_out = {name: why_left_out(folder / name) for name in names if name not in files}
    try:
        parameters = count_parameters(folder, weights, config)
    except CheckpointError as error:
        reasons = ", ".join(f"{name} ({why})" for name, why in left_out.items()) or "nothing"
        raise CheckpointError(
            f"{error} Nothing was sent.\nTo be uploaded: {', '.join(files)}.\nNot to be uploaded: {reasons}."
        ) from error
    return Checkpoint(folder, config, files, left_out, parameters)


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raise an error if a file is a link that leaves the folder: publishing it would upload an unrelated file.

    The links of the Hub cache, whose files are in `blobs` next to `snapshots`, are accepted.

    Raises:
        CheckpointError: a file is such a link.
    """
    real = folder.resolve()
    places = [real] if real.parent.name != "snapshots" else [real, real.parent.parent / "blobs"]
    for name in names:
        target = (folder / name).resolve()
        if not any(target.is_relative_to(place) for place in places):
            raise CheckpointError(
                f"{folder / name} is a link to {target}, outside of the folder. Nothing was sent; remove the link, or "
                "copy the file into the folder."
            )


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`.

    Raises:
        CheckpointError: the file does not exist, or is not the config of a model.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / ADAPTER_CONFIG).exists():
            raise CheckpointError(
                f"{folder} holds an adapter without its base model, and only whole models are published. Merge it "
                f"(mlx-esm finetune --merge, or merge_adapters), or upload it as it is: hf upload OWNER/NAME {folder}. "
                "Nothing was sent."
            ) from None
        raise CheckpointError(f"{folder} contains no {CONFIG}: it is not a checkpoint. Nothing was sent.") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG} is not JSON ({error}). Nothing was sent.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(f"{folder / CONFIG} has no model_type, so it cannot be loaded. Nothing was sent.")
    return config


def variant_of(name: str) -> str | None:
    """Return the variant of a weights file or an index, "" if it has none; None for other files."""
    match = WEIGHTS.fullmatch(name) or INDEX.fullmatch(name)
    return (match["variant"] or "") if match else None


def loaded_weights(folder: Path, names: list[str]) -> list[str]:
    """Return the weights that `from_pretrained` reads: safetensors before `.bin`, one file before shards.

    Raises:
        CheckpointError: there are no weights, or an index lists a file that does not exist.
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
                    f"{folder} lacks {', '.join(missing)}, which {index} lists: the checkpoint is incomplete. Nothing "
                    "was sent."
                )
            files += [index, *shards]
    if not files:
        raise CheckpointError(f"{folder} contains no weights (model.safetensors, or shards and their index).")
    return files


def count_parameters(folder: Path, weights: Iterable[str], config: dict[str, Any]) -> int | None:
    """Return the number of parameters in the weights without a variant. Files are opened, arrays are not read.

    Raises:
        CheckpointError: a file is truncated, or a shard lacks an array that the index lists.
    """
    total = 0
    index: dict[str, str] = {}
    for name in weights:
        if INDEX.fullmatch(name):
            index |= json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"]
    for name in weights:
        if not name.endswith(".safetensors"):
            continue
        try:
            arrays = load_file(folder / name)
        except CheckpointError as error:
            if not (variant := variant_of(name)):
                raise
            raise CheckpointError(
                f"{error} Its name makes it the variant '{variant}' of the weights. Remove or rename it if it is not."
            ) from error
        if lost := [key for key, shard in index.items() if shard == name and key not in arrays]:
            raise CheckpointError(f"{folder / name} lacks {lost[0]!r}, which the index lists.")
        if variant_of(name) == "":
            total += sum(array.size for array in arrays.values())
    return total if total and not is_quantized(config) else None


def is_quantized(config: dict[str, Any]) -> bool:
    """Return whether the weights of a checkpoint with this config are quantized."""
    return bool(config.get("quantization") or config.get("quantization_config"))


def why_left_out(path: Path) -> str:
    """Return why a file is not published."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_symlink():
        return f"a link to {path.resolve()}, not part of a checkpoint"
    if path.is_dir():
        return "a folder"
    if variant_of(path.name) is not None:
        return "weights that are not loaded: other files take precedence, or no index lists them"
    return "not part of a checkpoint"
