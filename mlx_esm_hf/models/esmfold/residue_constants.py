"""Atoms of the residues, in the rigid groups that torsion angles rotate.

Ideal positions and names are AlphaFold 2's (Jumper et al. 2021, Supplement 1.8.4; doi:10.1038/s41586-021-03819-2). The
arrays at the end are computed from the table. Their first axis is the residue, in the order of `RESTYPES_WITH_X`; X has
no atoms.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESTYPES = "ARNDCQEGHILKMFPSTWYV"
RESTYPES_WITH_X = RESTYPES + "X"

# Order of atoms in arrays with one entry for every kind of atom.
ATOMS = (
    "N CA C CB O CG CG1 CG2 OG OG1 SG CD CD1 CD2 ND1 ND2 OD1 OD2 SD CE CE1 CE2 CE3 NE NE1 NE2 OE1 OE2 CH2 NH1 NH2 OH "
    "CZ CZ2 CZ3 NZ OXT"
)
ATOM37 = ATOMS.split()

# Name and letter of each residue, and the atoms along its side chain: four consecutive ones define a χ angle.
# Then for each atom: name, rigid group and position in the frame of that group, in Å. Groups are 0 backbone, 1 ω, 2 φ,
# 3 ψ, 4 to 7 χ1 to χ4. A group rotates around its x axis, whose end is the origin.
TABLE = """
ALA A
  N 0 -0.525 1.363 0; CA 0 0 0 0; C 0 1.526 0 0; O 3 0.627 1.062 0; CB 0 -0.529 -0.774 -1.205
ARG R N CA CB CG CD NE CZ
  N 0 -0.524 1.362 0; CA 0 0 0 0; C 0 1.525 0 0; O 3 0.626 1.062 0; CB 0 -0.524 -0.778 -1.209; CG 4 0.616 1.39 0
  CD 5 0.564 1.414 0; NE 6 0.539 1.357 0; CZ 7 0.758 1.093 0; NH1 7 0.206 2.301 0; NH2 7 2.078 0.978 0
ASN N N CA CB CG OD1
  N 0 -0.536 1.357 0; CA 0 0 0 0; C 0 1.526 0 0; O 3 0.625 1.062 0; CB 0 -0.531 -0.787 -1.2; CG 4 0.584 1.399 0
  OD1 5 0.633 1.059 0; ND2 5 0.593 -1.188 0.001
ASP D N CA CB CG OD1
  N 0 -0.525 1.362 0; CA 0 0 0 0; C 0 1.527 0 0; O 3 0.626 1.062 0; CB 0 -0.526 -0.778 -1.208; CG 4 0.593 1.398 0
  OD1 5 0.61 1.091 0; OD2 5 0.592 -1.101 -0.003
CYS C N CA CB SG
  N 0 -0.522 1.362 0; CA 0 0 0 0; C 0 1.524 0 0; O 3 0.625 1.062 0; CB 0 -0.519 -0.773 -1.212; SG 4 0.728 1.653 0
GLN Q N CA CB CG CD OE1
  N 0 -0.526 1.361 0; CA 0 0 0 0; C 0 1.526 0 0; O 3 0.626 1.062 0; CB 0 -0.525 -0.779 -1.207; CG 4 0.615 1.393 0
  CD 5 0.587 1.399 0; OE1 6 0.634 1.06 0; NE2 6 0.593 -1.189 -0.001
GLU E N CA CB CG CD OE1
  N 0 -0.528 1.361 0; CA 0 0 0 0; C 0 1.526 0 0; O 3 0.626 1.062 0; CB 0 -0.526 -0.781 -1.207; CG 4 0.615 1.392 0
  CD 5 0.6 1.397 0; OE1 6 0.607 1.095 0; OE2 6 0.589 -1.104 -0.001
GLY G
  N 0 -0.572 1.337 0; CA 0 0 0 0; C 0 1.517 0 0; O 3 0.626 1.062 0
HIS H N CA CB CG ND1
  N 0 -0.527 1.36 0; CA 0 0 0 0; C 0 1.525 0 0; O 3 0.625 1.063 0; CB 0 -0.525 -0.778 -1.208; CG 4 0.6 1.37 0
  ND1 5 0.744 1.16 0; CD2 5 0.889 -1.021 0.003; CE1 5 2.03 0.851 0.002; NE2 5 2.145 -0.466 0.004
ILE I N CA CB CG1 CD1
  N 0 -0.493 1.373 0; CA 0 0 0 0; C 0 1.527 0 0; O 3 0.627 1.062 0; CB 0 -0.536 -0.793 -1.213
  CG1 4 0.534 1.437 0; CG2 4 0.54 -0.785 -1.199; CD1 5 0.619 1.391 0
LEU L N CA CB CG CD1
  N 0 -0.52 1.363 0; CA 0 0 0 0; C 0 1.525 0 0; O 3 0.625 1.063 0; CB 0 -0.522 -0.773 -1.214; CG 4 0.678 1.371 0
  CD1 5 0.53 1.43 0; CD2 5 0.535 -0.774 1.2
LYS K N CA CB CG CD CE NZ
  N 0 -0.526 1.362 0; CA 0 0 0 0; C 0 1.526 0 0; O 3 0.626 1.062 0; CB 0 -0.524 -0.778 -1.208; CG 4 0.619 1.39 0
  CD 5 0.559 1.417 0; CE 6 0.56 1.416 0; NZ 7 0.554 1.387 0
MET M N CA CB CG SD CE
  N 0 -0.521 1.364 0; CA 0 0 0 0; C 0 1.525 0 0; O 3 0.625 1.062 0; CB 0 -0.523 -0.776 -1.21; CG 4 0.613 1.391 0
  SD 5 0.703 1.695 0; CE 6 0.32 1.786 0
PHE F N CA CB CG CD1
  N 0 -0.518 1.363 0; CA 0 0 0 0; C 0 1.524 0 0; O 3 0.626 1.062 0; CB 0 -0.525 -0.776 -1.212; CG 4 0.607 1.377 0
  CD1 5 0.709 1.195 0; CD2 5 0.706 -1.196 0; CE1 5 2.102 1.198 0; CE2 5 2.098 -1.201 0; CZ 5 2.794 -0.003 -0.001
PRO P N CA CB CG CD
  N 0 -0.566 1.351 0; CA 0 0 0 0; C 0 1.527 0 0; O 3 0.621 1.066 0; CB 0 -0.546 -0.611 -1.293; CG 4 0.382 1.445 0
  CD 5 0.477 1.424 0
SER S N CA CB OG
  N 0 -0.529 1.36 0; CA 0 0 0 0; C 0 1.525 0 0; O 3 0.626 1.062 0; CB 0 -0.518 -0.777 -1.211; OG 4 0.503 1.325 0
THR T N CA CB OG1
  N 0 -0.517 1.364 0; CA 0 0 0 0; C 0 1.526 0 0; O 3 0.626 1.062 0; CB 0 -0.516 -0.793 -1.215
  OG1 4 0.472 1.353 0; CG2 4 0.55 -0.718 -1.228
TRP W N CA CB CG CD1
  N 0 -0.521 1.363 0; CA 0 0 0 0; C 0 1.525 0 0; O 3 0.627 1.062 0; CB 0 -0.523 -0.776 -1.212; CG 4 0.609 1.37 0
  CD1 5 0.824 1.091 0; CD2 5 0.854 -1.148 -0.005; NE1 5 2.14 0.69 -0.004; CE2 5 2.186 -0.678 -0.007
  CE3 5 0.622 -2.53 -0.007; CZ2 5 3.283 -1.543 -0.011; CZ3 5 1.715 -3.389 -0.011; CH2 5 3.028 -2.89 -0.013
TYR Y N CA CB CG CD1
  N 0 -0.522 1.362 0; CA 0 0 0 0; C 0 1.524 0 0; O 3 0.627 1.062 0; CB 0 -0.522 -0.776 -1.213; CG 4 0.607 1.382 0
  CD1 5 0.716 1.195 0; CD2 5 0.713 -1.194 -0.001; CE1 5 2.107 1.2 -0.002; CE2 5 2.104 -1.201 -0.003
  CZ 5 2.791 -0.001 -0.003; OH 5 4.168 -0.002 -0.005
VAL V N CA CB CG1
  N 0 -0.494 1.373 0; CA 0 0 0 0; C 0 1.527 0 0; O 3 0.627 1.062 0; CB 0 -0.533 -0.795 -1.213; CG1 4 0.54 1.429 0
  CG2 4 0.533 -0.776 1.203
"""


class Residue(NamedTuple):
    """A residue of the table."""

    name: str  # three letters
    atoms: dict[str, tuple[int, np.ndarray]]  # {name: (group, position)}, in the order of `atom14`
    chain: list[str]  # atoms that define the χ angles


def _read_table() -> dict[str, Residue]:
    residues: dict[str, Residue] = {}
    for line in TABLE.strip().splitlines():
        if not line.startswith(" "):
            name, letter, *chain = line.split()
            residues[letter] = Residue(name, {}, chain)
            continue
        for atom in line.split(";"):
            label, group, *position = atom.split()
            residues[letter].atoms[label] = int(group), np.array(position, dtype=np.float64)
    return residues


RESIDUES = _read_table()
RESIDUE_NAMES = [RESIDUES[letter].name for letter in RESTYPES] + ["UNK"]


def _frame(x: np.ndarray, y: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Return the transformation [4, 4] of a frame with this x axis and origin and with `y` in its xy plane."""
    x = x / np.linalg.norm(x)
    y = y - (y @ x) * x
    y = y / np.linalg.norm(y)
    frame = np.eye(4)
    frame[:3] = np.stack([x, y, np.cross(x, y), origin], axis=1)
    return frame


def _default_frames(residue: Residue) -> np.ndarray:
    """Return each group's frame relative to its parent group at angle 0, [8, 4, 4]; zeros for missing χ angles."""
    at = {name: position for name, (_, position) in residue.atoms.items()}
    frames = np.zeros((8, 4, 4))
    frames[0] = frames[1] = np.eye(4)
    frames[2] = _frame(at["N"] - at["CA"], np.array([1.0, 0, 0]), at["N"])
    frames[3] = _frame(at["C"] - at["CA"], at["CA"] - at["N"], at["C"])
    for i, (first, second, end, _) in enumerate(zip(*(residue.chain[i:] for i in range(4)), strict=False)):
        if i == 0:  # its parent is the backbone
            frames[4] = _frame(at[end] - at[second], at[first] - at[second], at[end])
        else:  # its axis starts at the origin of its parent
            frames[4 + i] = _frame(at[end], np.array([-1.0, 0, 0]), at[end])
    return frames


DEFAULT_FRAMES = np.zeros((21, 8, 4, 4), dtype=np.float32)
ATOM14_GROUPS = np.zeros((21, 14), dtype=np.int32)
ATOM14_POSITIONS = np.zeros((21, 14, 3), dtype=np.float32)
ATOM14_MASK = np.zeros((21, 14), dtype=np.float32)
ATOM37_MASK = np.zeros((21, 37), dtype=np.float32)
ATOM14_TO_ATOM37 = np.zeros((21, 14), dtype=np.int64)
ATOM37_TO_ATOM14 = np.zeros((21, 37), dtype=np.int64)

for _row, _letter in enumerate(RESTYPES):
    DEFAULT_FRAMES[_row] = _default_frames(RESIDUES[_letter])
    for _place, (_name, (_group, _position)) in enumerate(RESIDUES[_letter].atoms.items()):
        _place37 = ATOM37.index(_name)
        ATOM14_GROUPS[_row, _place] = _group
        ATOM14_POSITIONS[_row, _place] = _position
        ATOM14_MASK[_row, _place] = ATOM37_MASK[_row, _place37] = 1
        ATOM14_TO_ATOM37[_row, _place] = _place37
        ATOM37_TO_ATOM14[_row, _place37] = _place
