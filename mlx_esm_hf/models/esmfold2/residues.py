"""The residues of ESMFold2: their ids in its features, and their atoms in a reference conformer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_esm_hf.models.esm.tokenization_esm import RESIDUE_IDS
from mlx_esm_hf.models.esmfold.residue_constants import RESIDUE_NAMES, RESTYPES, RESTYPES_WITH_X

TABLE = Path(__file__).with_name("residues.txt")

# Residue types: 0 for padding, 1 for a gap, the amino acids, X, and the nucleotides.
GAP = 1
RES_TYPES = {letter: number for number, letter in enumerate(RESTYPES_WITH_X, start=2)}
NUCLEOTIDES = {
    "RNA": dict(zip("AGCUN", range(23, 28), strict=True)),
    "DNA": dict(zip("AGCTN", range(28, 33), strict=True)),
}
UNKNOWN = RES_TYPES["X"]
NUM_RES_TYPES = 33

# Molecule types.
PROTEIN, DNA, RNA, LIGAND = range(4)

# ESMC's token ids. X has that of <unk>, as in training, although the vocabulary has a token X.
INPUT_IDS = {letter: RESIDUE_IDS[letter] for letter in RESTYPES} | {"X": 3}

# {residue type: name in structure files}
COMPONENTS = {RES_TYPES[letter]: name for letter, name in zip(RESTYPES_WITH_X, RESIDUE_NAMES, strict=True)}
COMPONENTS |= {number: letter for letter, number in NUCLEOTIDES["RNA"].items()}
COMPONENTS |= {number: f"D{letter}" for letter, number in NUCLEOTIDES["DNA"].items()}

ATOMIC_NUMBERS = {"C": 6, "N": 7, "O": 8, "S": 16}


class ResidueAtoms(NamedTuple):
    """The heavy atoms of a residue, in the order of the features.

    Attributes:
        names: names of the atoms.
        chars: [atoms, 4], the names as `encode_name` returns them.
        elements: [atoms], atomic numbers.
        charges: [atoms], formal charges.
        positions: [atoms, 3], in the reference conformer, in Å.
        representative: index of the atom whose distances the distogram predicts: Cβ, or Cα if there is no Cβ.
    """

    names: list[str]
    chars: np.ndarray
    elements: np.ndarray
    charges: np.ndarray
    positions: np.ndarray
    representative: int


@cache
def residue_atoms() -> dict[str, ResidueAtoms]:
    """Return {letter: atoms} of the amino acids and X, whose four backbone atoms are all at the origin."""
    rows: dict[str, list[list[str]]] = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            residue, *atom = line.split()
            rows.setdefault(RESTYPES_WITH_X[RESIDUE_NAMES.index(residue)], []).append(atom)
    residues = {}
    for letter, atoms in rows.items():
        names = [atom[0] for atom in atoms]
        residues[letter] = ResidueAtoms(
            names,
            np.array([encode_name(name) for name in names], dtype=np.int64),
            np.array([ATOMIC_NUMBERS[name[0]] for name in names], dtype=np.int64),
            np.array([atom[1] for atom in atoms], dtype=np.int8),
            np.array([atom[2:] for atom in atoms], dtype=np.float32),
            names.index("CB" if "CB" in names else "CA"),
        )
    return residues


def encode_name(name: str) -> list[int]:
    """Return the name of an atom as four character codes minus 32, with 0 (a blank) on the right."""
    return [ord(character) - 32 for character in f"{name:4.4}"]


def decode_name(chars: np.ndarray) -> str:
    """Return the name of an atom from the result of `encode_name`."""
    return "".join(chr(int(code) + 32) for code in chars).strip()
