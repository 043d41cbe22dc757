"""Proteins from FASTA files."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from Bio import SeqIO


class Protein(NamedTuple):
    """A record: the first word of its title line, and its residues as upper-case letters."""

    id: str
    sequence: str


def read_fasta(path: str | os.PathLike[str]) -> Iterator[Protein]:
    """The proteins of a FASTA file, plain or gzipped, in its order.

    Raises:
        ValueError: the file is not FASTA, a record is empty, or the gzip stream is damaged; with file and record.
        OSError: the file cannot be opened.
    """
    for record in _records(path):
        if not record.seq:
            raise ValueError(f"{path}: the record {record.id!r} is empty.")
        yield Protein(str(record.id), str(record.seq).upper())


def _records(path: str | os.PathLike[str]) -> Iterator[SeqIO.SeqRecord]:
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    place = "the first record"
    with (gzip.open if zipped else open)(path, "rt", encoding="utf-8-sig") as lines:  # type: ignore[operator]
        try:
            for record in SeqIO.parse(lines, "fasta"):
                yield record
                place = f"the record after {record.id!r}"
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: the gzip stream is damaged at {place} ({error}).") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text, let alone FASTA, at {place} ({error}).") from error
        except ValueError as error:
            raise ValueError(f"{path} is not FASTA: it does not begin with a title line, such as '>P1'.") from error
