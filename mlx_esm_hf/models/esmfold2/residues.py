"""The residues of ESMFold2: their numbers in its features, and their atoms in a reference conformer."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np

from mlx_esm_hf.models.esm.tokenization_esm import RESIDUE_IDS
from mlx_esm_hf.models.esmfold.residue_constants import RESIDUE_NAMES, RESTYPES, RESTYPES_WITH_X

# Residue types: 0 for padding, 1 for a gap, the amino acids, X, and the nucleotides.
GAP = 1
RES_TYPES = {letter: number for number, letter in enumerate(RESTYPES_WITH_X, start=2)}
NUCLEOTIDES = {
    "RNA": dict(zip("AGCUN", range(23, 28), strict=True)),
    "DNA": dict(zip("AGCTN", range(28, 33), strict=True)),
}
UNKNOWN = RES_TYPES["X"]

# Molecule types.
PROTEIN, DNA, RNA, LIGAND = range(4)

UNKNOWN_ID = 3  # the token <unk> of ESMC, which the published features have for X
INPUT_IDS = {letter: RESIDUE_IDS[letter] for letter in RESTYPES} | {"X": UNKNOWN_ID}

# {residue type: name in structure files}; one-letter codes are not enough there.
COMPONENTS = {RES_TYPES[letter]: name for letter, name in zip(RESTYPES_WITH_X, RESIDUE_NAMES, strict=True)}
COMPONENTS |= {number: letter for letter, number in NUCLEOTIDES["RNA"].items()}
COMPONENTS |= {number: f"D{letter}" for letter, number in NUCLEOTIDES["DNA"].items()}

ATOMIC_NUMBERS = {"C": 6, "N": 7, "O": 8, "S": 16}


class ResidueAtoms(NamedTuple):
    """The heavy atoms of a residue, in the order of the features.

    Attributes:
        names: of the atoms.
        elements: atomic numbers.
        charges: formal charges, int8.
        positions: [atoms, 3], in the reference conformer, in Å.
    """

    names: list[str]
    elements: np.ndarray
    charges: np.ndarray
    positions: np.ndarray

    @property
    def representative(self) -> int:
        """Index of the atom that stands for the residue in distances: Cβ, or Cα where there is none."""
        return self.names.index("CB" if "CB" in self.names else "CA")


@cache
def residue_atoms() -> dict[str, ResidueAtoms]:
    """Return {letter: atoms} of the amino acids and X, whose four backbone atoms are all at the origin."""
    rows: dict[str, list[list[str]]] = {}
    for line in files(__package__).joinpath("residues.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, *atom = line.split()
            rows.setdefault(RESTYPES_WITH_X[RESIDUE_NAMES.index(name)], []).append(atom)
    return {
        letter: ResidueAtoms(
            [atom[0] for atom in atoms],
            np.array([ATOMIC_NUMBERS[atom[0][0]] for atom in atoms], dtype=np.int64),
            np.array([atom[1] for atom in atoms], dtype=np.int8),
            np.array([atom[2:] for atom in atoms], dtype=np.float32),
        )
        for letter, atoms in rows.items()
    }


def encode_name(name: str) -> list[int]:
    """Return the four numbers of an atom's name in the features: characters from the blank on, blanks at the end."""
    return [ord(character) - 32 for character in f"{name:4.4}"]


def decode_name(chars: np.ndarray) -> str:
    """Return the name of an atom from its four numbers in the features."""
    return "".join(chr(int(number) + 32) for number in chars).strip()
