"""Token ids of proteins on disk: FASTA is parsed once, and proteins are then read by index from memory-mapped files.

A store is a folder: `tokens.bin` contains the ids of all proteins, concatenated; `ends.npy` the end of each protein;
`hashes.npy` a hash of each sequence, which decides the split; `store.json` what the store was made from;
`checksums.txt` the checksums of the others.
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
from mlx_esm_hf.data.source import STDIN, Proteins, ProteinSource, sha256_of
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runs.manifest import CHECKSUMS, read_checksums
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.files import finish_replacing, remove_temporary, replace_folder
from mlx_esm_hf.training.checksums import check_files, write_checksums

DESCRIPTION = "store.json"
FILES = ("tokens.bin", "ends.npy", "hashes.npy", DESCRIPTION)


class TokenStore:
    """The proteins of a FASTA file as token ids.

    Args:
        folder: written by `open_store`.

    Attributes:
        lengths: residues of each protein, int64 [proteins].
        hashes: hash of each sequence, uint64 [proteins].
        sha256: checksum of all sequences in their order.
    """

    def __init__(self, folder: Path):
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        self._ends = np.load(folder / "ends.npy", mmap_mode="r")
        self._ids = np.memmap(folder / "tokens.bin", description["dtype"], mode="r")
        self.lengths = np.diff(self._ends, prepend=0)
        self.hashes = np.load(folder / "hashes.npy", mmap_mode="r")
        checksums = read_checksums(folder / CHECKSUMS)
        self.sha256 = hashlib.sha256(f"{checksums['tokens.bin']} {checksums['ends.npy']}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the ids of a protein's residues, int32 [residues]."""
        end = int(self._ends[index])
        return self._ids[end - int(self.lengths[index]) : end].astype(np.int32)


def open_store(source: str | os.PathLike[str], folder: Path, vocabulary: Vocabulary, report: Report) -> TokenStore:
    """Open the store of a FASTA file. Rank 0 makes it first unless the folder contains one made from the same file.

    Args:
        source: a FASTA file of any size, plain, gzipped or zstandard-compressed.
        folder: the folder of the store.
        vocabulary: the model's vocabulary.
        report: collects what was changed and which proteins were skipped, if the file is read.

    Raises:
        ValueError: the file is not found, is not FASTA, or contains no proteins, or the store is damaged.
    """
    distributed.on_rank_0(lambda: _make_store(source, folder, vocabulary, report))
    return TokenStore(folder)


def _make_store(source: str | os.PathLike[str], folder: Path, vocabulary: Vocabulary, report: Report) -> None:
    if source == STDIN or not os.path.isfile(source):
        raise UserError(f"{source} must be a FASTA file: training cannot read proteins from anything else.")
    wanted = {"sha256": sha256_of(source), "vocabulary": sorted(vocabulary.ids.items()), "version": 2}
    wanted = json.loads(json.dumps(wanted))
    finish_replacing(folder)
    remove_temporary(folder)  # also of a process that was killed after it had finished the store
    try:
        existing = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        existing = {}
    if isinstance(existing, dict) and all(existing.get(key) == value for key, value in wanted.items()):
        check_files(folder, FILES, f"Remove {folder}: it is made again from {source}.")
    else:
        with replace_folder(folder) as part:
            _write_store(source, part, vocabulary, report, wanted)


def _write_store(
    source: Proteins, folder: Path, vocabulary: Vocabulary, report: Report, wanted: dict[str, Any]
) -> None:
    dtype = np.dtype(np.uint8 if max(vocabulary.ids.values()) < 256 else np.uint16)
    ends, hashes = array("q"), array("Q")
    end = 0
    with open(folder / "tokens.bin", "wb") as file:
        for protein in ProteinSource.open(source).read(report, clean=vocabulary.alphabet.clean):
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
        raise UserError("\n".join([f"{source} contains no proteins.", *report.left_out]))
    np.save(folder / "ends.npy", np.frombuffer(ends, np.int64))
    np.save(folder / "hashes.npy", np.frombuffer(hashes, np.uint64))
    (folder / DESCRIPTION).write_text(json.dumps(wanted | {"dtype": dtype.name}), encoding="utf-8")
    write_checksums(folder)


def split(store: TokenStore, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the proteins to train with and of those to validate with.

    The hash of the sequence decides. Duplicates are on the same side, and proteins stay there when the file grows.

    Args:
        store: the proteins.
        share: fraction of the distinct sequences to validate with.
    """
    chosen = np.asarray(store.hashes) < threshold(share)
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def is_held_out(sequence: bytes, share: float) -> bool:
    """Return whether a sequence is in the validation data, given their share of all sequences."""
    return hash_of(sequence) < threshold(share)


def hash_of(sequence: bytes) -> int:
    """Return a uniform hash below 2^64 that is identical on every machine."""
    return int.from_bytes(hashlib.blake2b(sequence, digest_size=8).digest(), "little")


def threshold(share: float) -> int:
    """Return the hash below which a sequence is held out."""
    return int(share * 2**64)
