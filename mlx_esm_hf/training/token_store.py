"""Proteins as token ids on the disk: read once from FASTA, then taken by number without being loaded.

A store is a folder: `tokens.bin` has the ids of all proteins, one behind the other; `ends.npy` where each ends;
`hashes.npy` a number for each sequence, by which proteins are split; `store.json` what they were made from.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.source import STDIN, Proteins, read_proteins, sha256_of
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.files import remove_temporary, replace_folder

DESCRIPTION = "store.json"


class TokenStore:
    """The proteins of a FASTA file as token ids.

    Attributes:
        lengths: residues of each protein, int64 [proteins].
        hashes: of each sequence, uint64 [proteins]: equal sequences have equal ones.
    """

    def __init__(self, folder: Path):
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        self._ends = np.load(folder / "ends.npy", mmap_mode="r")
        self._ids = np.memmap(folder / "tokens.bin", description["dtype"], mode="r")
        self.lengths = np.diff(self._ends, prepend=0)
        self.hashes = np.load(folder / "hashes.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> np.ndarray:
        """The ids of a protein's residues, int32 [residues]."""
        end = int(self._ends[number])
        return self._ids[end - int(self.lengths[number]) : end].astype(np.int32)


def open_store(source: str | os.PathLike[str], folder: Path, vocabulary: Vocabulary, report: Report) -> TokenStore:
    """The store of a FASTA file in a folder: the one that is there, if it was made of the same file, or a new one. Of
    several ranks the first one makes it.

    Args:
        source: FASTA of any size, plain, gzipped or zstandard-compressed.
        report: takes what was changed and left out, when the file is read.

    Raises:
        ValueError: what is no file, holds no proteins, or is not FASTA.
    """
    distributed.on_rank_0(lambda: _make_store(source, folder, vocabulary, report))
    return TokenStore(folder)


def _make_store(source: str | os.PathLike[str], folder: Path, vocabulary: Vocabulary, report: Report) -> None:
    if source == STDIN or not os.path.isfile(source):
        raise UserError(f"{source} is no file: training reads its proteins from FASTA files.")
    wanted = {"sha256": sha256_of(source), "vocabulary": sorted(vocabulary.ids.items()), "version": 1}
    wanted = json.loads(json.dumps(wanted))
    try:
        there = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        there = {}
    if any(there.get(key) != value for key, value in wanted.items()):
        remove_temporary(folder)
        with replace_folder(folder) as part:
            _write_store(source, part, vocabulary, report, wanted)


def _write_store(
    source: Proteins, folder: Path, vocabulary: Vocabulary, report: Report, wanted: dict[str, Any]
) -> None:
    dtype = np.dtype(np.uint8 if max(vocabulary.ids.values()) < 256 else np.uint16)
    ends, hashes = array("q"), array("Q")
    end = 0
    with open(folder / "tokens.bin", "wb") as file:
        for protein in read_proteins(source, report=report):
            try:
                data = vocabulary.encode(protein.sequence).astype(dtype).tobytes()
            except ValueError as error:
                report.leave_out(f"{protein.place}: {protein.id!r} {error}.")
                continue
            file.write(data)
            end += len(data) // dtype.itemsize
            ends.append(end)
            hashes.append(hash_of(data))
    if not ends:
        raise UserError("\n".join([f"{source} holds no proteins.", *report.left_out]))
    np.save(folder / "ends.npy", np.frombuffer(ends, np.int64))
    np.save(folder / "hashes.npy", np.frombuffer(hashes, np.uint64))
    (folder / DESCRIPTION).write_text(json.dumps(wanted | {"dtype": dtype.name}), encoding="utf-8")


def split(store: TokenStore, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the proteins to train with, and of those to validate with.

    It goes by the sequence, so what stands twice in a file is on one side, and stays there when the file grows.

    Args:
        share: of the different sequences, to validate with.
    """
    chosen = np.asarray(store.hashes) < threshold(share)
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def held_out(sequence: bytes, share: float) -> bool:
    """Whether a sequence is one of this share of all."""
    return hash_of(sequence) < threshold(share)


def hash_of(sequence: bytes) -> int:
    """Below 2^64; evenly spread over sequences, and the same on every machine."""
    return int.from_bytes(hashlib.blake2b(sequence, digest_size=8).digest(), "little")


def threshold(share: float) -> int:
    return int(share * 2**64)
