"""The manifest of a run and the list of its checksums."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mlx_esm_hf.errors import UserError

MANIFEST = "manifest.json"
CHECKSUMS = "checksums.txt"  # in the format of sha256sum: check them with sha256sum -c checksums.txt

NO_MANIFEST = "is not the manifest of a run. Remove {}, or choose another output."


def read_checksums(path: Path) -> dict[str, str]:
    """Read {name: checksum}. The last line of a name counts; malformed lines, such as one cut off by a kill, do not."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="ascii", errors="replace").split("\n")
    return {match[2]: match[1] for line in lines if (match := re.fullmatch(r"([0-9a-f]{64})  (\S+)", line))}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a run.

    Raises:
        UserError: the file is not a manifest.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} {NO_MANIFEST.format(folder)} ({error})") from error
    if not is_manifest(manifest):
        raise UserError(f"{path} {NO_MANIFEST.format(folder)}")
    return manifest


def manifest_of(command: str, settings: dict[str, Any], source: dict[str, str]) -> dict[str, Any]:
    """Return the manifest of a new run, with values as JSON reads them.

    Args:
        command: name of the job.
        settings: what the results depend on besides the input.
        source: the description of the input.
    """
    return json.loads(json.dumps({"version": 1, "command": command, "settings": settings, "input": source}))


def refuse_another(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume a run with other settings or input.

    Args:
        folder: its folder.
        before: its manifest.
        now: the manifest of the new run, or what is known of it: only the settings in it are compared.

    Raises:
        UserError: they differ. The message lists the differences.
    """
    if "sha256" not in now["input"]:
        raise UserError(
            f"{folder} already contains a run, and a run on {now['input']['name']!r} (not a file) cannot be resumed. "
            "Choose another output, or remove the folder."
        )
    differences = []
    if before["command"] != now["command"]:
        differences.append(f"command: {before['command']}; now: {now['command']}")
    for part in ("settings", "input"):
        for key, value in now[part].items():
            if key != "name" and before[part].get(key) != value:
                differences.append(f"{key}: {shown(before[part].get(key))}; now: {shown(value)}")
    if differences:
        raise UserError(
            f"{folder} belongs to a run with other settings ({', '.join(differences)}). Choose another output, or "
            "remove the folder."
        )


def shown(value: Any) -> str:
    """Return a setting as users write it: a list without brackets, and words without quotes."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def is_manifest(value: Any) -> bool:
    """Return whether a value has the parts of a manifest, with the right types."""
    if not isinstance(value, dict) or not isinstance(value.get("command"), str):
        return False
    settings, source = value.get("settings"), value.get("input")
    if not isinstance(settings, dict) or not isinstance(source, dict):
        return False
    if not all(is_count(settings.get(name, 1)) for name in ("batch_tokens", "memory")):
        return False
    if not {"items", "shards", "left_out"} & value.keys():
        return True
    left_out = value.get("left_out")
    is_list = isinstance(left_out, list) and all(isinstance(message, str) for message in left_out)
    counts = (value.get("items"), value.get("shards"), value.get("files", 1))
    return is_list and all(is_count(count) for count in counts)


def is_count(value: Any) -> bool:
    """Return whether a value is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
