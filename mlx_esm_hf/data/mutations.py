"""Tables of mutations: substitutions like A42G, and several of them joined by a colon."""

from __future__ import annotations

import contextlib
import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from mlx_esm_hf.data.proteins import CHAIN_BREAK, RESIDUES, residue_places, tokens
from mlx_esm_hf.errors import UserError

SUBSTITUTION = re.compile(r"([A-Za-z])(-?\d{1,9})([A-Za-z])")


class Substitution(NamedTuple):
    """A residue that becomes another; `position` is that in the sequence, from 0."""

    wild_type: str
    position: int
    mutant: str


def parse(mutant: str, sequence: str, first_residue: int = 1) -> list[Substitution]:
    """The substitutions of `A42G` or `A42G:L7P`.

    Args:
        sequence: the wild type.
        first_residue: the number that the table gives to the first residue of it. Numbers run on across its chains.

    Raises:
        ValueError: not of this form, outside the sequence, another wild type than the sequence has, or one position
            twice.
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
    """Wild type, number and mutant of each substitution, not held against a sequence."""
    parts = []
    for part in mutant.strip().split(":"):
        match = SUBSTITUTION.fullmatch(part.strip())
        if not match:
            raise UserError(f"{mutant!r} is no substitution like A42G, nor several like A42G:L7P")
        wild_type, number, to = match[1].upper(), int(match[2]), match[3].upper()
        if unknown := {wild_type, to} - set(RESIDUES):
            raise UserError(f"{mutant!r}: {unknown.pop()} is no residue")
        parts.append((wild_type, number, to))
    return parts


def suggest_first_residue(mutants: Sequence[str], sequence: str) -> int | None:
    """The numbering under which most substitutions have the wild type of the sequence; None if none has."""
    residues, hits = tokens(sequence.replace(CHAIN_BREAK, "")), Counter[int]()
    found = set[tuple[str, int]]()
    for mutant in mutants:
        with contextlib.suppress(ValueError):
            found.update((wild_type, number) for wild_type, number, _ in split(mutant))
    for wild_type, number in found:
        hits.update(number - place for place, residue in enumerate(residues) if residue == wild_type)
    return hits.most_common(1)[0][0] if hits else None


def read_table(path: str | os.PathLike[str], column: str) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a CSV file with a column of mutations.

    Raises:
        ValueError: no such column, or rows that do not fit the header, with file and line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            columns, rows = list(reader.fieldnames or []), []
            if len(set(columns)) < len(columns):
                raise UserError(f"{path} has two columns of one name: {', '.join(columns)}.")
            if column not in columns:
                known = ", ".join(columns) or "nothing in its first line"
                raise UserError(f"{path} has no column {column!r} (--mutant-column), but {known}.")
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{path}, line {reader.line_num}: the row does not have {len(columns)} columns.")
                rows.append(row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no CSV file ({error}).") from error
    return columns, rows
