"""Alphabets: how the sequences of a model are cleaned and divided into tokens. A tokenizer's vocabulary tells which."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import accumulate, pairwise, product

from mlx_esm_hf.data.proteins import CHAIN_BREAK, GAPS, RESIDUES, SPECIAL, STANDARD, Report, clean, tokens
from mlx_esm_hf.errors import UserError

STRUCTURE_LETTERS = "pynwrqhgdlvtmfsaeikc"  # of Foldseek's 3Di alphabet
UNKNOWN = "#"  # an unknown residue or structure letter of a pair
PAIR = re.compile(f"[{RESIDUES}{UNKNOWN}][{STRUCTURE_LETTERS}{UNKNOWN}]")


class Proteins:
    """Residues, one token each.

    Attributes:
        name: the kind of sequences, for messages.
        example: a sequence of one token.
        scanned: the letters that a scan puts at each position.
    """

    name, example, scanned = "proteins", "A", STANDARD

    def clean(self, sequence: str, aligned: bool = False, report: Report | None = None) -> str:
        """Clean a sequence; see `data.proteins.clean`."""
        return clean(sequence, aligned, report)

    def tokens(self, sequence: str) -> list[str]:
        """Divide a cleaned sequence into tokens."""
        return tokens(sequence)

    @property
    def standard(self) -> list[str]:
        """The tokens that stand for something known: the 20 residues."""
        return list(STANDARD)

    @property
    def predicted(self) -> list[str]:
        """The tokens that training masks and a perplexity counts. X stands for an unknown residue."""
        return list(RESIDUES.replace("X", ""))

    def masked(self, token: str) -> str:
        """Return the token that hides another one."""
        return "<mask>"

    def replaced(self, token: str, other: str) -> str:
        """Return what stands in the place of a token if another one replaces it, in training and in mutants."""
        return other

    def spans(self, tokens: list[str]) -> list[tuple[int, int]]:
        """Return the first position of each token in the sequence, counted from 0, and the one after its last."""
        return [(place, place + 1) for place in range(len(tokens))]

    def mutate(self, tokens: list[str], mutations: list[tuple[int, str]]) -> dict[int, str]:
        """Return {index: token} for the tokens that mutations change.

        Args:
            tokens: the tokens of the wild type.
            mutations: positions in the sequence, counted from 0, and their new letters.
        """
        return {position: self.replaced(tokens[position], letter) for position, letter in mutations}

    def alternatives(self, token: str) -> list[str]:
        """Return the tokens whose probabilities add up to that of a token."""
        return [token]


class Nucleotides(Proteins):
    """DNA in k-mers, as in the Nucleotide Transformer.

    It is cut from the left. What is left over, and what holds N, becomes single letters.

    Args:
        k: letters of a k-mer.

    Source: Dalla-Torre et al. 2023 (doi:10.1101/2023.01.11.523679), Methods.
    """

    name, scanned = "DNA", "ACGT"

    def __init__(self, k: int):
        self.example = "A" * k
        self._token = re.compile(rf"<[^<>]*>|[ACGT]{{{k}}}|.", re.DOTALL)

    def clean(self, sequence: str, aligned: bool = False, report: Report | None = None) -> str:
        """Clean a sequence: upper case, U as T, no gaps, and N for the IUPAC codes of several nucleotides.

        Raises:
            UserError: it is empty, or contains an unknown token or another character, such as a gap to keep.
        """
        parts = _parts(sequence, aligned, report)
        parts = [part.upper().replace("U", "T") if len(part) == 1 else part for part in parts]
        return "".join(_letters(parts, "ACGTN", "N", "nucleotide", report, "RYSWKMBDHV"))

    def tokens(self, sequence: str) -> list[str]:
        """Divide a cleaned sequence into tokens."""
        return self._token.findall(sequence)

    @property
    def standard(self) -> list[str]:
        """The tokens that stand for something known: all k-mers and the four letters."""
        return ["".join(letters) for letters in product("ACGT", repeat=len(self.example))] + list("ACGT")

    @property
    def predicted(self) -> list[str]:
        """The tokens that training masks and a perplexity counts."""
        return self.standard

    def spans(self, tokens: list[str]) -> list[tuple[int, int]]:
        """Return the first nucleotide of each token, counted from 0, and the one after its last."""
        ends = list(accumulate(1 if token in SPECIAL else len(token) for token in tokens))
        return list(pairwise([0, *ends]))

    def mutate(self, tokens: list[str], mutations: list[tuple[int, str]]) -> dict[int, str]:
        """Return {index: token} for the k-mers and letters that mutations change."""
        spans, changed = self.spans(tokens), dict[int, str]()
        for position, letter in mutations:
            index = next(i for i, (_, end) in enumerate(spans) if position < end)
            token, place = changed.get(index, tokens[index]), position - spans[index][0]
            changed[index] = f"{token[:place]}{letter}{token[place + 1 :]}"
        return changed


class StructureLetters(Proteins):
    """Structure letters of the 3Di alphabet in lower case, one token each, as in ProTrek's structure model.

    Source: van Kempen et al. 2024 (doi:10.1038/s41587-023-01773-0).
    """

    name, example = "3Di structure letters", "d"

    def clean(self, sequence: str, aligned: bool = False, report: Report | None = None) -> str:
        """Clean a sequence: lower case, no gaps.

        Raises:
            UserError: it is empty, or contains an unknown token or another letter, such as a gap to keep.
        """
        parts = [part.lower() for part in _parts(sequence, aligned, report)]
        return "".join(_letters(parts, STRUCTURE_LETTERS, "", "structure letter", report))

    @property
    def standard(self) -> list[str]:
        """The tokens that stand for something known: the 20 letters."""
        return list(STRUCTURE_LETTERS)

    @property
    def predicted(self) -> list[str]:
        """The tokens that training masks and a perplexity counts."""
        return self.standard


class Pairs(Proteins):
    """Residues with their structure letters, one token for each pair, as in SaProt: `MdEvVp`.

    `#` stands for an unknown residue or structure letter: a plain sequence `MEV` becomes `M#E#V#`.

    Source: Su et al. 2024 (doi:10.1101/2023.10.01.560349), section 3.1.
    """

    name, example = "pairs of residues and structure letters", "A#"
    _token = re.compile(r"<[^<>]*>|..|.", re.DOTALL)

    def clean(self, sequence: str, aligned: bool = False, report: Report | None = None) -> str:
        """Clean a sequence of pairs or a plain sequence of residues.

        Raises:
            UserError: it is empty, or contains an unknown token, or a part of it is not a pair.
        """
        text = "".join(sequence.split())
        if CHAIN_BREAK in text:
            raise UserError(f"has a chain break ({CHAIN_BREAK}), for which models of {self.name} have no token")
        if not is_paired(text):
            if aligned and any(gap in text for gap in GAPS):
                raise UserError(f"has a gap, for which models of {self.name} have no token")
            report = report or Report()
            report.can_align = False
            residues = tokens(clean(text, False, report))
            return "".join(token if len(token) > 1 else f"{_residue(token, report)}{UNKNOWN}" for token in residues)
        cleaned = []
        for place, part in enumerate(self._token.findall(text), 1):
            if part in SPECIAL:
                cleaned.append(part)
            elif PAIR.fullmatch(part):
                cleaned.append(f"{_residue(part[0], report)}{part[1]}")
            else:
                raise UserError(
                    f"has {part!r} at position {place}, which is not a pair of a residue and a structure letter, such "
                    "as 'Md', or 'M#' without a structure"
                )
        if not cleaned:
            raise UserError("is empty")
        return "".join(cleaned)

    def tokens(self, sequence: str) -> list[str]:
        """Divide a cleaned sequence into tokens."""
        return self._token.findall(sequence)

    @property
    def standard(self) -> list[str]:
        """The tokens that stand for something known: the 20 residues with each structure letter."""
        return [f"{residue}{letter}" for residue in STANDARD for letter in STRUCTURE_LETTERS + UNKNOWN]

    @property
    def predicted(self) -> list[str]:
        """The tokens that training masks and a perplexity counts."""
        return self.standard

    def masked(self, token: str) -> str:
        """Return the token that hides a residue and keeps its structure letter, such as #d."""
        return f"{UNKNOWN}{token[1]}" if len(token) == 2 else token

    def replaced(self, token: str, other: str) -> str:
        """Return the residue of another token, or the other residue, with the structure letter of a token."""
        return f"{other[0] if other[0] in STANDARD else UNKNOWN}{token[1]}" if len(token) == 2 else other

    def alternatives(self, token: str) -> list[str]:
        """Return all pairs with the residue of a token: their probabilities add up to that of the residue."""
        return [f"{token[0]}{letter}" for letter in STRUCTURE_LETTERS + UNKNOWN] if len(token) == 2 else [token]


def alphabet_of(vocabulary: Mapping[str, int], name: str) -> Proteins:
    """Return the alphabet of a vocabulary.

    Args:
        vocabulary: {token: id}.
        name: name of the model, for messages.

    Raises:
        UserError: it is none of the known alphabets.
    """
    if all(residue in vocabulary for residue in STANDARD):
        return Proteins()
    if all(f"{residue}{letter}" in vocabulary for residue in STANDARD for letter in STRUCTURE_LETTERS + UNKNOWN):
        return Pairs()
    if all(letter in vocabulary for letter in STRUCTURE_LETTERS):
        return StructureLetters()
    words = [token for token in vocabulary if len(token) > 1 and set(token) <= set("ACGT")]
    k = max(map(len, words), default=0)
    if k and len(words) == 4**k and all(letter in vocabulary for letter in "ACGTN"):
        return Nucleotides(k)
    missing = ", ".join(residue for residue in STANDARD if residue not in vocabulary)
    raise UserError(
        f"The vocabulary of {name} lacks the residues {missing}, and has neither k-mers of DNA, nor pairs of residues "
        "and structure letters, nor 3Di structure letters. Its tokenizer is for other sequences, or vocab.txt is "
        "damaged."
    )


def is_paired(sequence: str) -> bool:
    """Return whether a sequence has structure letters: it is neither upper nor lower case, or has a `#`."""
    plain = re.sub(r"<[^<>]*>|[^A-Za-z#]", "", sequence)
    return UNKNOWN in plain or not (plain.isupper() or plain.islower() or not plain)


def _parts(sequence: str, aligned: bool, report: Report | None) -> list[str]:
    """Split a sequence into letters and special tokens, without white space, a stop at its end, and gaps to drop."""
    parts = re.findall(r"<[^<>]*>|.", "".join(sequence.split()), re.DOTALL)
    if parts and parts[-1] == "*":
        parts.pop()
    kept = [part for part in parts if aligned or part not in GAPS]
    if report is not None:
        report.gaps += len(parts) - len(kept)
        report.can_align = False
    return kept


def _letters(
    parts: list[str], letters: str, replacement: str, kind: str, report: Report | None, replaced: str = ""
) -> list[str]:
    """Check the parts of a sequence and replace some letters.

    Raises:
        UserError: there are no parts, or one of them is neither a letter nor a known token, or cannot be replaced.
    """
    if not parts:
        raise UserError("is empty")
    checked = []
    for place, part in enumerate(parts, 1):
        if len(part) > 1 and part not in SPECIAL:
            raise UserError(f"has the unknown token {part} at position {place}; must be one of {', '.join(SPECIAL)}")
        known = len(part) > 1 or part in letters
        if not known and part not in replaced:
            raise UserError(f"has {part!r} at position {place}, which is not a {kind}")
        if not known and report is not None:
            report.replaced += 1
            report.unknown = replacement
        checked.append(part if known else replacement)
    return checked


def _residue(letter: str, report: Report | None) -> str:
    """Return a residue, or `#` for an unknown one and for B, U, Z and O, which SaProt's vocabulary does not have."""
    if letter in STANDARD:
        return letter
    if report is not None and letter not in ("X", UNKNOWN):
        report.replaced += 1
        report.unknown = UNKNOWN
    return UNKNOWN
