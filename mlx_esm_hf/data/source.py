"""Where proteins come from: FASTA files, streams and Python objects."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import IO, TYPE_CHECKING, Any

import zstandard
from Bio.Seq import Seq
from Bio.SeqIO.FastaIO import SimpleFastaParser

from mlx_esm_hf.data.proteins import RESIDUES, Protein, Report, clean, clean_chains
from mlx_esm_hf.errors import UserError, quoted

if TYPE_CHECKING:
    from mlx_esm_hf.data.structures import Structures

STDIN = "-"
BARE_SEQUENCE = re.compile(rf"(?:[{RESIDUES}:|*-]|<mask>){{3,}}")

# What callers may pass as proteins: the path of a FASTA file, "-" for standard input, or Python objects.
Proteins = str | os.PathLike | Iterable[Any]

Cleaner = Callable[[str, bool, Report | None], str]

# Where a record is (for messages), its id, and its sequence.
Record = tuple[str, str, Any]


@dataclass
class ProteinSource:
    """Proteins as the caller passed them, examined once by `ProteinSource.open`.

    Attributes:
        name: what the manifest of a run calls it: the name of a file, the path of a stream, "Python" for objects.
        path: the path of a file or stream, `-` for standard input; None for Python objects.
        objects: the Python objects; see `read_proteins`.
        can_reread: whether it is a file, which can be read more than once and has a checksum.
        resumable: whether a run on objects can be resumed, because the settings of its job determine them.
        aligned: keep gaps.
        chains: a protein may have several chains, separated by `:`.
        structures: structure letters, which make pairs of the residues.
    """

    name: str
    path: str | None = None
    objects: Iterable[Any] = ()
    can_reread: bool = False
    resumable: bool = False
    aligned: bool = False
    chains: bool = False
    structures: Structures | None = None

    @classmethod
    def open(
        cls,
        proteins: Proteins,
        aligned: bool = False,
        chains: bool = False,
        structure: str | os.PathLike[str] | None = None,
    ) -> ProteinSource:
        """Return the source of what a caller passed as proteins.

        Args:
            proteins: see `read_proteins`.
            aligned: keep gaps.
            chains: a protein may have several chains, separated by `:`.
            structure: a file of structure letters; see `Structures`.

        Raises:
            UserError: standard input is closed, or a file is not found, is a folder, is empty or is not FASTA.
        """
        source = cls._open(proteins, aligned, chains)
        if structure is not None:
            from mlx_esm_hf.data.structures import Structures

            source.structures = Structures(structure)
        return source

    @classmethod
    def _open(cls, proteins: Proteins, aligned: bool, chains: bool) -> ProteinSource:
        if isinstance(proteins, Mapping):
            proteins = proteins.items()
        if not isinstance(proteins, (str, os.PathLike)):
            return cls("Python", objects=proteins, aligned=aligned, chains=chains)
        path = os.fspath(proteins)
        if path == STDIN:
            _standard_input()
        if is_stream(path):
            return cls(path, path, aligned=aligned, chains=chains)
        check_fasta(path)
        return cls(os.path.basename(path), path, can_reread=True, aligned=aligned, chains=chains)

    @property
    def is_stream(self) -> bool:
        """Whether it is standard input or a pipe, which can be read only once."""
        return self.path is not None and not self.can_reread

    @cached_property
    def sha256(self) -> str | None:
        """The checksum of a file when it was first asked for; None for a source whose runs cannot be resumed."""
        if self.path is not None and self.can_reread:
            return sha256_of(self.path)
        return "" if self.resumable else None

    def has_changed(self) -> bool:
        """Return whether a file has changed since its checksum was first asked for."""
        return self.path is not None and self.can_reread and sha256_of(self.path) != self.sha256

    def read(
        self, report: Report | None = None, rename: Callable[[str], str] = str, clean: Cleaner = clean
    ) -> Iterator[Protein]:
        """Yield the proteins in order, cleaned; those that cannot be read are left out.

        Args:
            report: takes the counts and messages. If it is strict, a bad record raises an error.
            rename: returns the name of the next record, given its id. It is called for each record in the source.
            clean: cleans a sequence of one chain; by default a protein.

        Raises:
            UserError: the file is not FASTA or is damaged.
            OSError: the file cannot be opened.
        """
        report = report if report is not None else Report()
        cleaned = clean_chains if self.chains else clean
        for place, id, sequence in _from_python(self.objects) if self.path is None else read_fasta(self.path):
            name = rename(id)
            try:
                if not isinstance(sequence, str):
                    raise UserError(f"is not a sequence, but {sequence!r}")
                if self.structures is not None:
                    sequence = self.structures.pair(id, sequence)
                yield Protein(name, cleaned(sequence, self.aligned, report), place)
            except UserError as error:
                report.leave_out(f"{place}: {quoted(name)} {error}.")

    def peek(self, count: int) -> list[Protein]:
        """Return up to `count` of the first proteins without using them up; none if the source is a stream."""
        if self.is_stream:
            return []
        if self.path is None:
            self.objects = list(self.objects)
        return list(islice(self.read(), count))


def read_proteins(
    proteins: Proteins, aligned: bool = False, report: Report | None = None, chains: bool = False
) -> Iterator[Protein]:
    """Yield the proteins of a file or of Python objects in order, cleaned; those that cannot be read are left out.

    Args:
        proteins: the path of a FASTA file or pipe, plain, gzip- or zstandard-compressed; `-` for standard input; or an
            iterable of sequences, (id, sequence) pairs or Biopython records, or a mapping of ids to them. The ids of
            plain sequences are their numbers, counted from 1.
        aligned: keep gaps.
        report: takes the counts and messages, which name the file, the line and the id. If it is strict, a bad record
            raises an error.
        chains: a protein may have several chains, separated by `:`.

    Raises:
        UserError: the file is not FASTA or is damaged.
        OSError: the file cannot be opened.

    Example:
        >>> [protein.sequence for protein in read_proteins(["mktayi", ("P1", "MK*")])]
        ['MKTAYI', 'MK']
    """
    return ProteinSource.open(proteins, aligned, chains).read(report)


def is_stream(path: str) -> bool:
    """Return whether a path is `-`, a pipe or another special file, which can be read only once."""
    return path == STDIN or (os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path))


def check_file(path: str | os.PathLike[str], expected: str) -> None:
    """Refuse a path that is not a file that can be read.

    Args:
        path: the path.
        expected: what the file should be, such as "a FASTA file".

    Raises:
        UserError: the file is not found, is a folder, or cannot be opened.
    """
    if os.path.isdir(path):
        raise UserError(f"{os.fspath(path)} is a folder. Expected {expected}.")
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise UserError(f"File not found: {os.fspath(path)}.") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{quoted(os.fspath(path))} cannot be read ({reason}).") from error


def check_fasta(path: str) -> None:
    """Refuse a path that is not a FASTA file with at least one record.

    Raises:
        UserError: the file is not found, is a folder, is empty or is not FASTA.
    """
    if not os.path.exists(path) and BARE_SEQUENCE.fullmatch(path):
        shown = path if len(path) <= 100 else f"{path[:100]}..."
        raise UserError(f"File not found: {shown}. To pass a sequence, write a FASTA file or pipe it to `-`.")
    check_file(path, "a FASTA file")
    if next(read_fasta(path), None) is None:
        raise UserError(f"{path} contains no proteins: the file is empty.")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 checksum of a file, of the compressed bytes if it is compressed."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _standard_input() -> IO[bytes]:
    if sys.stdin is None or sys.stdin.closed:
        raise UserError("Standard input is closed, so there is nothing to read. Name a FASTA file instead of '-'.")
    return sys.stdin.buffer


def _from_python(objects: Iterable[Any]) -> Iterator[Record]:
    for number, record in enumerate(objects, 1):
        name, sequence = str(number), record
        if isinstance(record, (tuple, list)) and len(record) == 2:
            name, sequence = str(record[0]), getattr(record[1], "seq", record[1])
        elif hasattr(record, "seq"):
            name, sequence = str(record.id), record.seq
        yield f"record {number}", name, str(sequence) if isinstance(sequence, Seq) else sequence


class _Lines:
    """The lines of a text, with the number of the last one."""

    def __init__(self, file: Iterable[str]) -> None:
        self.lines, self.number = iter(file), 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.number += 1
        return line


def read_fasta(path: str, titles: bool = False) -> Iterator[Record]:
    """Yield the records of a FASTA file, plain, gzip- or zstandard-compressed, or of standard input.

    Args:
        path: the file; "-" for standard input.
        titles: yield whole titles instead of ids, their first words. Lines that start with `#` may precede the first
            title, as in ColabFold's alignments.
    """
    is_stdin = path == STDIN
    name = "standard input" if is_stdin else path
    with contextlib.ExitStack() as stack:
        raw: Any = _standard_input() if is_stdin else stack.enter_context(open(path, "rb"))
        # Bytes that are not UTF-8 are harmless in a title; in a sequence `clean` reports the replacement character.
        text = io.TextIOWrapper(_decompressed(raw), encoding="utf-8-sig", errors="replace")
        stack.callback(text.detach if is_stdin else text.close)
        lines, record = _Lines(text), "the first record"
        try:
            first = next((line for line in lines if line.strip() and not (titles and line.startswith("#"))), None)
            if first is None:
                return
            if not first.startswith(">"):
                raise UserError(
                    f"{name}, line {lines.number}: this is not FASTA. Expected a title line such as '>P1' first."
                )
            start = lines.number
            for number, (title, sequence) in enumerate(SimpleFastaParser(chain([first], lines)), 1):
                words = title.split(maxsplit=1)
                identifier = words[0] if words else f"record_{number}"
                yield f"{name}, line {start}", title if titles else identifier, sequence
                start, record = lines.number, f"the record after {identifier!r}"  # the parser has read the next title
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise UserError(
                f"{name}, line {lines.number + 1}: the compressed data is damaged in {record} ({error})."
            ) from error


def _decompressed(raw: Any) -> IO[bytes]:
    start = raw.peek(4)[:4]
    if start[:2] == b"\x1f\x8b":
        return gzip.open(raw)  # type: ignore[return-value]
    if start == b"\x28\xb5\x2f\xfd":
        return io.BufferedReader(_Zstandard(raw))
    return raw


class _Zstandard(io.RawIOBase):
    """Zstandard frames as one stream. Unlike zstandard's own reader it raises EOFError if the last frame is cut off."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw, self.frame, self.data, self.pending = raw, zstandard.ZstdDecompressor().decompressobj(), b"", b""
        self.inside = False  # of a frame

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.data:
            block = self.pending or self.raw.read(1 << 16)
            if not block:
                if self.inside:
                    raise EOFError("it ends within a frame")
                return 0
            self.data, self.pending = self.frame.decompress(block), b""
            self.inside = not self.frame.eof
            if self.frame.eof:
                self.pending = self.frame.unused_data
                self.frame = zstandard.ZstdDecompressor().decompressobj()
        size = min(len(buffer), len(self.data))
        buffer[:size], self.data = self.data[:size], self.data[size:]
        return size
