"""A complex of proteins, nucleic acids and ligands, with all its atoms, as a PDB file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from Bio.Data.IUPACData import atom_weights

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.models.esmfold.protein import ONE_LETTER_CHAINS, half_up, seqres_lines, title_lines
from mlx_esm_hf.models.esmfold2.residues import COMPONENTS, LIGAND, UNKNOWN, decode_name

LIGAND_NAME = "LIG"
# Limits of the columns of a PDB file: numbers of residues and of atoms, and coordinates in Å.
PDB_FIRST_RESIDUE, PDB_RESIDUES, PDB_ATOMS = -999, 9_999, 99_999
PDB_LOWEST, PDB_HIGHEST = -999.9994, 9999.9994
# Symbols of the elements by atomic number; X is an unknown element.
ELEMENTS = ["X", *(symbol.upper() for symbol in atom_weights if symbol != "D")]


def output_to_pdb(features: Mapping[str, Any], coords: Any, plddt: Any, title: str = "") -> str:
    """Return a structure as a PDB file: chains named by `asym_id` from A, `residue_index` from 1, pLDDT as B factor.

    Ligands are HETATM records of residues named LIG, after the polymer of their chain.

    Args:
        features: of one protein or complex, with a batch axis of 1; see `features.protein_features`.
        coords: [A, 3], positions in Å; those of padding are not read.
        plddt: [A], from 0 to 1.
        title: ASCII text for the TITLE records.

    Raises:
        UserError: wrong shapes, or more chains, residues or atoms, or larger coordinates, than a PDB file holds.
    """
    arrays = {name: np.array(array) for name, array in features.items() if array is not None}
    batch, A = arrays["atom_to_token"].shape
    if batch != 1:
        raise UserError(f"features must be of one protein, got a batch of {batch}.")
    coords, plddt = np.asarray(coords, dtype=np.float64), np.asarray(plddt, dtype=np.float64)
    if coords.shape != (A, 3) or plddt.shape != (A,):
        raise UserError(f"coords and plddt must have shapes {(A, 3)} and {(A,)}, got {coords.shape} and {plddt.shape}.")
    at = {name: array[0] for name, array in arrays.items()}
    exists, token = at["atom_attention_mask"].astype(bool), at["atom_to_token"]
    is_ligand = at["mol_type"][token] == LIGAND
    tokens = np.flatnonzero(at["attention_mask"])
    chains = np.unique(at["asym_id"][tokens])
    ends = len(np.unique(at["asym_id"][token[exists & ~is_ligand]]))  # TER records
    _check_limits(chains, at["residue_index"][tokens] + 1, coords[exists], ends)

    sequences: list[str] = []
    lines: list[str] = []
    for chain in chains:
        name = ONE_LETTER_CHAINS[chain]
        in_chain = exists & (at["asym_id"][token] == chain)
        polymer = tokens[(at["asym_id"][tokens] == chain) & (at["mol_type"][tokens] != LIGAND)]
        residues = {int(at["residue_index"][one]): f"{residue_name(at, one):>3s}" for one in polymer}
        sequences += seqres_lines(name, list(residues.values()))
        for record, atoms in (("ATOM", in_chain & ~is_ligand), ("HETATM", in_chain & is_ligand)):
            residue = ""
            for atom in np.flatnonzero(atoms):
                residue = f"{residue_name(at, token[atom]):>3s} {name}{at['residue_index'][token[atom]] + 1:4d}"
                chars, element = at["ref_atom_name_chars"][atom], element_symbol(at["ref_element"][atom])
                x, y, z = map(half_up, coords[atom])
                lines.append(
                    f"{record:6s}{len(lines) + 1:5d} {_label(chars, element)} {residue}    {x:8.3f}{y:8.3f}{z:8.3f}"
                    f"{1:6.2f}{half_up(100 * plddt[atom]):6.2f}          {element:>2s}"
                )
            if record == "ATOM" and residue:
                lines.append(f"TER   {len(lines) + 1:5d}      {residue}")
    cell = "CRYST1    1.000    1.000    1.000  90.00  90.00  90.00 P 1"  # required by the format; no crystal
    return "".join(f"{line:80s}\n" for line in [*title_lines(title), *sequences, cell, *lines, "END"])


def residue_name(features: Mapping[str, np.ndarray], token: Any) -> str:
    """Return the name of a token's residue in structure files: LIG for a ligand, UNK for a modified residue."""
    if features["mol_type"][token] == LIGAND:
        return LIGAND_NAME
    return COMPONENTS.get(int(features["res_type"][token]), COMPONENTS[UNKNOWN])


def _check_limits(chains: np.ndarray, numbers: np.ndarray, coords: np.ndarray, ends: int) -> None:
    """Refuse what the columns of a PDB file cannot hold.

    Args:
        chains: values of `asym_id`.
        numbers: numbers of the residues.
        coords: [atoms, 3].
        ends: number of TER records, which are numbered like atoms.
    """
    if (count := int(chains.max()) + 1) > len(ONE_LETTER_CHAINS):
        raise UserError(f"A PDB file holds at most {len(ONE_LETTER_CHAINS)} chains, got {count}. Write mmCIF instead.")
    outside = numbers[(numbers > PDB_RESIDUES) | (numbers < PDB_FIRST_RESIDUE)]
    if outside.size:
        raise UserError(
            f"A PDB file numbers residues from {PDB_FIRST_RESIDUE} to {PDB_RESIDUES:,}, got residue {outside[0]:,}. "
            "Write mmCIF instead."
        )
    if (count := len(coords) + ends) > PDB_ATOMS:
        raise UserError(
            f"A PDB file holds at most {PDB_ATOMS:,} atoms and ends of chains, got {count:,}. Write mmCIF instead."
        )
    fits = (coords > PDB_LOWEST) & (coords < PDB_HIGHEST)
    if not fits.all():
        limits = f"{PDB_LOWEST:.3f} to {PDB_HIGHEST:.3f} Å"
        raise UserError(f"The coordinates of a PDB file must be from {limits}, got {coords[~fits][0]:.3f}.")


def element_symbol(number: int) -> str:
    """Return the symbol of an element in capitals, X for an unknown one."""
    return ELEMENTS[number] if number < len(ELEMENTS) else ELEMENTS[0]


def _label(chars: np.ndarray, element: str) -> str:
    """Return the name of an atom in its four columns: the symbol of the element ends in the second."""
    name = decode_name(chars)
    return f"{name:4s}" if len(name) == 4 or len(element) == 2 else f" {name:<3s}"
