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
