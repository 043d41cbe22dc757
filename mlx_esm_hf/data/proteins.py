"""Proteins and the rules that clean their sequences, so that one position is one token of the model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from mlx_esm_hf.errors import UserError

STANDARD = "ACDEFGHIKLMNPQRSTVWY"
RESIDUES = STANDARD + "XBUZO"
GAPS = "-."
CHAIN_BREAK = "|"
ALPHABET = frozenset(RESIDUES)
SPECIAL = ("<mask>", "<cls>", "<eos>", "<unk>")
TOKEN = re.compile(r"<[^<>]*>|.", re.DOTALL)
PLAIN = re.compile(f"[{RESIDUES}]+")


class Protein(NamedTuple):
    """A protein.

    Attributes:
        id: its identifier, the first word of a FASTA title.
        sequence: upper-case residues and special tokens, such as `MK<mask>A`, with `|` between chains.
        place: where it was found, for messages: "proteins.fasta, line 3".
    """

    id: str
    sequence: str
    place: str = ""

    def __repr__(self) -> str:
        end = "..." if len(self.sequence) > 40 else ""
        return f"Protein(id={self.id!r}, sequence='{self.sequence[:40]}{end}', place={self.place!r})"


@dataclass
class Report:
    """What reading changed and left out.

    Attributes:
        strict: raise an error for a bad record instead of leaving it out.
        replaced: number of letters outside the alphabet that were read as `unknown`.
        unknown: the letter of something unknown: X for residues, N for nucleotides, # in pairs with structure letters.
        gaps: number of gaps that were dropped.
        can_align: whether the alphabet has gaps, so that `aligned` can keep them.
        renamed: number of records whose id repeats an earlier one, and which got a number: `id#2`.
        left_out: a message for each record that was left out.
    """

    strict: bool = False
    replaced: int = 0
    unknown: str = "X"
    gaps: int = 0
    can_align: bool = True
    renamed: int = 0
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, message: str) -> None:
        """Record that a protein is left out.

        Raises:
            UserError: with this message, if the report is strict.
        """
        if self.strict:
            raise UserError(message)
        self.left_out.append(message)


def tokens(sequence: str) -> list[str]:
    """Split a cleaned sequence into its positions: residues, special tokens and chain breaks."""
    return TOKEN.findall(sequence) if "<" in sequence else list(sequence)


def residue_places(sequence: str) -> list[int]:
    """Return the positions of a cleaned sequence that are not chain breaks."""
    return [place for place, token in enumerate(tokens(sequence)) if token != CHAIN_BREAK]


def clean(sequence: str, aligned: bool = False, report: Report | None = None) -> str:
    """Clean a sequence: upper case, no white space, no stop at the end, X for letters outside the alphabet.

    Args:
        sequence: residues and special tokens.
        aligned: keep gaps (`-` and `.`) instead of dropping them.
        report: counts the letters replaced by X and the gaps dropped.

    Raises:
        UserError: the sequence or one of its chains is empty, or it contains a stop before its end, an unknown token,
            or a character that is not a letter, gap, token or chain break.
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
            raise UserError(f"has a stop (*) at position {place}, before its end: cut or split the sequence there")
        elif len(part) > 1:
            raise UserError(f"has the unknown token {part} at position {place}; must be one of {', '.join(SPECIAL)}")
        elif part.isascii() and part.isalpha():
            report.replaced += 1
            cleaned.append("X")
        else:
            raise UserError(f"has {part!r} at position {place}, which is not a residue")
    if not any(cleaned):
        raise UserError("is empty")
    if CHAIN_BREAK in cleaned and not all("".join(cleaned).split(CHAIN_BREAK)):
        raise UserError(f"has an empty chain: {CHAIN_BREAK} must stand between two chains")
    return "".join(cleaned)


def clean_chains(sequence: str, aligned: bool = False, report: Report | None = None) -> str:
    """Clean each chain of a protein whose chains are separated by `:`.

    Raises:
        UserError: a chain cannot be cleaned, see `clean`.
    """
    chains = sequence.split(":")
    cleaned = []
    for number, part in enumerate(chains, 1):
        try:
            cleaned.append(clean(part, aligned, report))
        except UserError as error:
            raise UserError(f"{error}, in chain {number}" if len(chains) > 1 else str(error)) from None
    return ":".join(cleaned)
