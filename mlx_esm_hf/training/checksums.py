"""Checksums of the files in a folder, in the format of sha256sum."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mlx_esm_hf.data.source import sha256_of
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runs.manifest import CHECKSUMS, read_checksums


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files in a folder into it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="ascii")


def check_files(folder: Path, required: Iterable[str], advice: str) -> dict[str, str]:
    """Compare the files in a folder with their checksums, and return {name: checksum}.

    Args:
        folder: a folder with the file that `write_checksums` wrote.
        required: names of files that must be there.
        advice: what to do about a damaged file, for the message.

    Raises:
        UserError: a file is damaged or missing.
    """
    for name in (CHECKSUMS, *required):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} not found. {advice}")
    checksums = read_checksums(folder / CHECKSUMS)
    if missing := sorted(set(required) - checksums.keys()):
        raise UserError(f"{folder / CHECKSUMS} is damaged: it has no line for {missing[0]}. {advice}")
    for name, checksum in checksums.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} not found. {advice}")
        if sha256_of(path) != checksum:
            raise UserError(f"{path} is damaged: its checksum differs from the one in {CHECKSUMS}. {advice}")
    return checksums
