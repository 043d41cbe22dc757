"""Proteins from files and from Python, cleaned so that one position of the sequence is one token of the model."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import IO, Any, NamedTuple

import zstandard
from Bio.Seq import Seq
from Bio.SeqIO.FastaIO import SimpleFastaParser

from mlx_esm_hf.errors import UserError

STANDARD = "ACDEFGHIKLMNPQRSTVWY"
RESIDUES = STANDARD + "XBUZO"
GAPS = "-."
CHAIN_BREAK = "|"
ALPHABET = frozenset(RESIDUES)
SPECIAL = ("<mask>", "<cls>", "<eos>", "<unk>")
TOKEN = re.compile(r"<[^<>]*>|.", re.DOTALL)
PLAIN = re.compile(f"[{RESIDUES}]+")
STDIN = "-"

Source = str | os.PathLike | Iterable[Any]


class Protein(NamedTuple):
    """An id, a sequence of upper-case residues and special tokens, such as `MK<mask>A`, with `|` between its chains,
    and where it was found."""

    id: str
    sequence: str
    place: str = ""


@dataclass
class Report:
    """What was changed and left out on the way. With `strict`, a bad record is an error instead."""

    strict: bool = False
    replaced: int = 0  # letters outside the alphabet, now X
    gaps: int = 0  # dropped
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, message: str) -> None:
        """
        Raises:
            ValueError: with `strict`, this message.
        """
        if self.strict:
            raise UserError(message)
        self.left_out.append(message)


def is_stdin(source: Source) -> bool:
    """Whether a source is standard input."""
    return isinstance(source, str) and source == STDIN


def is_stream(source: Source) -> bool:
    """Whether it can be read only once, and not be taken up again: standard input, or a path that is no file, such as a
    pipe or the `<(...)` of a shell."""
    if is_stdin(source) or not isinstance(source, (str, os.PathLike)):
        return is_stdin(source)
    return os.path.exists(source) and not os.path.isfile(source) and not os.path.isdir(source)


def standard_input() -> IO[bytes]:
    """
    Raises:
        ValueError: it is closed.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise UserError("Standard input is closed, there is nothing to read: name a file.")
    return sys.stdin.buffer


def quoted(id: str) -> str:
    """An id in a message."""
    return repr(id if len(id) <= 100 else f"{id[:100]}...")


def tokens(sequence: str) -> list[str]:
    """The positions of a cleaned sequence: residues, special tokens and the breaks between chains."""
    return TOKEN.findall(sequence) if "<" in sequence else list(sequence)


def residue_places(sequence: str) -> list[int]:
    """At which positions of a cleaned sequence its residues stand: all but the breaks between chains."""
    return [place for place, token in enumerate(tokens(sequence)) if token != CHAIN_BREAK]


def clean(sequence: str, aligned: bool = False, report: Report | None = None) -> str:
    """The sequence by the rules of the README: upper case, no white space, no stop at the end, X for other letters.

    Args:
        aligned: keep gaps (`-`, `.`), which are dropped otherwise.
        report: counts the letters that became X, and the gaps.

    Raises:
        ValueError: nothing is left, or nothing of a chain; a stop inside; an unknown token; what is neither letter,
            gap, token nor a break between chains.
    """
    if PLAIN.fullmatch(sequence):
        return sequence
    report = report or Report()
    parts = TOKEN.findall("".join(sequence.split()))
    if parts and parts[-1] == "*":
        parts.pop()
    cleaned = []
    for place, part in enumerate(parts, 1):
        if part in SPECIAL or part == CHAIN_BREAK:
            cleaned.append(part)
        elif part.isascii() and part.upper() in ALPHABET:
            cleaned.append(part.upper())
        elif part in GAPS:
            report.gaps += not aligned
            cleaned.append(part if aligned else "")
        elif part == "*":
            raise UserError(f"has a stop (*) inside, at {place}: split it, or cut it there")
        elif len(part) > 1:
            raise UserError(f"has the token {part} at {place}; known are {', '.join(SPECIAL)}")
        elif part.isascii() and part.isalpha():
            report.replaced += 1
            cleaned.append("X")
        else:
            raise UserError(f"has {part!r} at {place}, which is no residue")
    if not any(cleaned):
        raise UserError("is empty")
    if CHAIN_BREAK in cleaned and not all("".join(cleaned).split(CHAIN_BREAK)):
        raise UserError(f"has an empty chain: {CHAIN_BREAK} stands between chains")
    return "".join(cleaned)


def clean_chains(sequence: str, aligned: bool = False, report: Report | None = None) -> str:
    """The chains of a protein, with `:` between them, each as `clean` makes it.

    Raises:
        ValueError: as `clean`, of one of the chains.
    """
    chains = sequence.split(":")
    cleaned = []
    for number, part in enumerate(chains, 1):
        try:
            cleaned.append(clean(part, aligned, report))
        except ValueError as error:
            raise UserError(f"{error}, in chain {number}" if len(chains) > 1 else str(error)) from None
    return ":".join(cleaned)


def read_proteins(
    source: Source, aligned: bool = False, report: Report | None = None, chains: bool = False
) -> Iterator[Protein]:
    """The proteins of a source in its order; those that cannot be read are left to the report.

    Args:
        source: the path of a FASTA file or pipe, plain, gzipped or zstandard-compressed; `-`, standard input; or an
            iterable of sequences, of pairs (id, sequence) or of Biopython records. Sequences alone are numbered from 1.
        aligned: keep gaps.
        report: takes counts and messages, which name the file, the line and the id.
        chains: a protein may have several, with `:` between them.

    Raises:
        ValueError: not FASTA, or a damaged stream; with a strict report, a bad record.
        OSError: the file cannot be opened.
    """
    report = report if report is not None else Report()
    records = _from_file(source) if isinstance(source, (str, os.PathLike)) else _from_python(source)
    for place, name, sequence in records:
        try:
            if not isinstance(sequence, str):
                raise UserError(f"is no sequence, but {sequence!r}")
            yield Protein(name, (clean_chains if chains else clean)(sequence, aligned, report), place)
        except ValueError as error:
            report.leave_out(f"{place}: {quoted(name)} {error}.")


def _from_python(source: Iterable[Any]) -> Iterator[tuple[str, str, Any]]:
    for number, record in enumerate(source, 1):
        name, sequence = str(number), record
        if hasattr(record, "seq"):
            name, sequence = str(record.id), record.seq
        elif isinstance(record, (tuple, list)) and len(record) == 2:
            name, sequence = str(record[0]), record[1]
        yield f"record {number}", name, str(sequence) if isinstance(sequence, Seq) else sequence


class _Lines:
    """The lines of a text, counted."""

    def __init__(self, file: Iterable[str]):
        self.lines, self.number = iter(file), 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.number += 1
        return line


def _from_file(path: str | os.PathLike[str]) -> Iterator[tuple[str, str, str]]:
    name = "standard input" if is_stdin(path) else os.fspath(path)
    with contextlib.ExitStack() as stack:
        raw: Any = standard_input() if is_stdin(path) else stack.enter_context(open(path, "rb"))
        # Bytes that are no UTF-8 do no harm in a title, and in a sequence they are named as what is no residue.
        text = io.TextIOWrapper(_decompressed(raw), encoding="utf-8-sig", errors="replace")
        stack.callback(text.detach if is_stdin(path) else text.close)
        lines, record = _Lines(text), "the first record"
        try:
            first = next((line for line in lines if line.strip()), None)
            if first is None:
                return
            if not first.startswith(">"):
                raise UserError(
                    f"{name}, line {lines.number}: this is not FASTA, which begins with a title line, such as '>P1'."
                )
            start = lines.number
            for number, (title, sequence) in enumerate(SimpleFastaParser(chain([first], lines)), 1):  # type: ignore
                words = title.split(maxsplit=1)
                identifier = words[0] if words else f"record_{number}"
                yield f"{name}, line {start}", identifier, sequence
                start, record = lines.number, f"the record after {identifier!r}"  # the parser has read the next title
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise UserError(
                f"{name}, line {lines.number + 1}: the compressed stream is damaged in {record} ({error})."
            ) from error


def _decompressed(raw: Any) -> IO[bytes]:
    start = raw.peek(4)[:4]
    if start[:2] == b"\x1f\x8b":
        return gzip.open(raw)  # type: ignore[return-value]
    if start == b"\x28\xb5\x2f\xfd":
        return io.BufferedReader(_Zstandard(raw))  # type: ignore[return-value]
    return raw


class _Zstandard(io.RawIOBase):
    """Zstandard frames as one stream, whose end has to be the end of a frame (the library's reader does not mind)."""

    def __init__(self, raw: IO[bytes]):
        self.raw, self.frame, self.data, self.pending = raw, zstandard.ZstdDecompressor().decompressobj(), b"", b""
        self.inside = False  # a frame

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
