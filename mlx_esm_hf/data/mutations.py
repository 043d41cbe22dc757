"""Mutations such as A42G or A42G:L7P, and tables of them."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from mlx_esm_hf.data.proteins import CHAIN_BREAK, RESIDUES, residue_places, tokens
from mlx_esm_hf.data.source import check_file
from mlx_esm_hf.data.tables import open_csv, refuse_repeated
from mlx_esm_hf.errors import UserError

SUBSTITUTION = re.compile(r"([A-Za-z])(-?\d{1,9})([A-Za-z])")


class Substitution(NamedTuple):
    """A residue replaced by another. `position` counts from 0 in the sequence."""

    wild_type: str
    position: int
    mutant: str


def parse(mutant: str, sequence: str, first_residue: int = 1) -> list[Substitution]:
    """Parse a mutant such as `A42G` or `A42G:L7P` and check it against the wild type.

    Args:
        mutant: substitutions joined by colons.
        sequence: the wild type.
        first_residue: the number of the first residue of the sequence. Numbers continue from chain to chain.

    Raises:
        UserError: the mutant does not have this form, is outside the sequence, names another wild type than the
            sequence has, or changes a position twice.
    """
    found: list[Substitution] = []
    residues, places = tokens(sequence), residue_places(sequence)
    for wild_type, number, to in split(mutant):
        if not 0 <= number - first_residue < len(places):
            raise UserError(
                f"{mutant}: {number} is outside the sequence, {first_residue} to {first_residue + len(places) - 1}"
            )
        position = places[number - first_residue]
        if residues[position] != wild_type:
            raise UserError(f"{mutant}: the sequence has {residues[position]} at {number}, not {wild_type}")
        if any(position == other.position for other in found):
            raise UserError(f"{mutant}: {number} is mutated twice")
        found.append(Substitution(wild_type, position, to))
    return found


def split(mutant: str) -> list[tuple[str, int, str]]:
    """Return the wild type, number and mutant of each substitution, without checking them against a sequence.

    Raises:
        UserError: the mutant does not have the form `A42G:L7P`.
    """
    parts = []
    for part in mutant.strip().split(":"):
        match = SUBSTITUTION.fullmatch(part.strip())
        if not match:
            raise UserError(f"{mutant!r} is not a mutation. Expected one such as A42G or A42G:L7P")
        wild_type, number, to = match[1].upper(), int(match[2]), match[3].upper()
        if unknown := {wild_type, to} - set(RESIDUES):
            raise UserError(f"{mutant!r}: {unknown.pop()} is not a residue")
        parts.append((wild_type, number, to))
    return parts


def suggest_first_residue(mutants: Sequence[str], sequence: str) -> int | None:
    """Return the number of the first residue that makes most wild types match the sequence; None if none match."""
    residues, hits = tokens(sequence.replace(CHAIN_BREAK, "")), Counter[int]()
    found = set[tuple[str, int]]()
    for mutant in mutants:
        with contextlib.suppress(ValueError):
            found.update((wild_type, number) for wild_type, number, _ in split(mutant))
    for wild_type, number in found:
        hits.update(number - place for place, residue in enumerate(residues) if residue == wild_type)
    return hits.most_common(1)[0][0] if hits else None


def read_table(path: str | os.PathLike[str], column: str) -> tuple[list[str], list[dict[str, str]]]:
    """Read a CSV file that has a column of mutations.

    Returns:
        The columns, and the rows as dictionaries.

    Raises:
        UserError: the file is not CSV or lacks the column, or a row does not fit the header. The message names the
            line.
    """
    check_file(path, "a CSV file")
    table = open_csv(path, mutant=column)
    refuse_repeated(path, table.columns)
    return table.columns, [row for _, row in table.rows]
