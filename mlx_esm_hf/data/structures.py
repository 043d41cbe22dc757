"""Structure letters of proteins, from Foldseek or from the user, for models of pairs such as SaProt."""

from __future__ import annotations

import os
from collections.abc import Iterator

from mlx_esm_hf.data.alphabets import STRUCTURE_LETTERS, UNKNOWN, is_paired
from mlx_esm_hf.data.proteins import tokens
from mlx_esm_hf.data.source import check_file, read_fasta, sha256_of
from mlx_esm_hf.errors import UserError, quoted


class Structures:
    """The structure letters of proteins, by id.

    Args:
        path: a table of `foldseek structureto3didescriptor` (columns separated by tabs: id, residues, structure
            letters, …), or a FASTA file of structure letters, upper or lower case.

    Attributes:
        sha256: the checksum of the file.

    Raises:
        UserError: the file cannot be read, has other letters, or an id twice. The message names the line.

    Source: Foldseek (van Kempen et al. 2024, doi:10.1038/s41587-023-01773-0); SaProt's `foldseek_util.py`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        check_file(path, "a table of Foldseek or a FASTA file")
        self.sha256 = sha256_of(path)
        self._letters: dict[str, tuple[str, str]] = {}  # {id: (place, letters)}
        for place, id, letters in _records(self.path):
            letters = "".join(letters.split()).lower()
            if wrong := set(letters) - set(STRUCTURE_LETTERS + UNKNOWN):
                raise UserError(f"{place}: {quoted(id)} has {min(wrong)!r}, which is not a structure letter.")
            if id in self._letters:
                raise UserError(f"{place}: {quoted(id)} has structure letters already, from {self._letters[id][0]}.")
            self._letters[id] = place, letters

    def pair(self, id: str, sequence: str) -> str:
        """Return a sequence of residues as pairs with its structure letters, such as `MdEv` for `ME`.

        Args:
            id: id of the protein.
            sequence: its residues. `<mask>` becomes `#` with a structure letter.

        Raises:
            UserError: the protein has no structure letters, or not one for each residue, or is one of pairs already.
        """
        if is_paired(sequence):
            raise UserError(f"has structure letters already, besides those in {self.path}")
        if id not in self._letters:
            raise UserError(f"has no structure letters in {self.path}")
        place, letters = self._letters[id]
        residues = tokens("".join(sequence.split()).removesuffix("*"))
        if len(residues) != len(letters):
            raise UserError(f"has {len(residues)} residues, but {len(letters)} structure letters ({place})")
        shown = (UNKNOWN if residue == "<mask>" else residue.upper() for residue in residues)
        return "".join(f"{residue}{letter}" for residue, letter in zip(shown, letters, strict=True))


def _records(path: str) -> Iterator[tuple[str, str, str]]:
    """Yield (place, id, structure letters) of a file."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        if file.read(1) == ">":
            yield from read_fasta(path)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            columns = line.rstrip("\n").split("\t")
            if not line.strip():
                continue
            if len(columns) < 3 or not columns[0].strip():
                raise UserError(
                    f"{path}, line {number}: expected an id, residues and structure letters, separated by tabs, as "
                    "`foldseek structureto3didescriptor` writes them."
                )
            yield f"{path}, line {number}", columns[0].split()[0], columns[2]
