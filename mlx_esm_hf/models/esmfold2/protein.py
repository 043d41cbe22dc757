"""A complex with all its atoms as a PDB file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from Bio.Data.IUPACData import atom_weights

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.models.esmfold.protein import ONE_LETTER_CHAINS, half_up, seqres_lines, title_lines
from mlx_esm_hf.models.esmfold2.residues import COMPONENTS, LIGAND, decode_name

LIGAND_NAME = "LIG"
PDB_RESIDUES, PDB_ATOMS, PDB_COORDINATE = 9_999, 99_999, 9_999.0
SYMBOLS = ["", *(symbol for symbol in atom_weights if symbol != "D")]  # by atomic number


def output_to_pdb(features: Mapping[str, Any], coords: np.ndarray, plddt: np.ndarray, title: str = "") -> str:
    """Return a structure as a PDB file: chains from A, the residues of each numbered from 1, pLDDT as B factor.

    Ligands are HETATM records of residues named LIG.

    Args:
        features: of one protein or complex, with batch 1; see `features.protein_features`.
        coords: [A, 3], in Å.
        plddt: [A], 0 to 1.
        title: ASCII text for the TITLE records.

    Raises:
        UserError: more chains, residues or atoms than a PDB file can hold, or a coordinate that its columns cannot.
    """
    at = {name: np.array(array)[0] for name, array in features.items()}
    valid = np.flatnonzero(at["atom_attention_mask"].astype(bool))
    chains = np.unique(at["asym_id"][at["attention_mask"].astype(bool)])
    for count, most, what in (
        (len(chains), len(ONE_LETTER_CHAINS), "chains"),
        (int(at["residue_index"].max()) + 1, PDB_RESIDUES, "residues in a chain"),
        (len(valid) + len(chains), PDB_ATOMS, "atoms"),
    ):
        if count > most:
            raise UserError(f"A PDB file holds at most {most:,} {what}, got {count:,}. Write mmCIF instead.")
    if np.abs(coords[valid]).max() >= PDB_COORDINATE:
        raise UserError(f"A coordinate is {np.abs(coords[valid]).max():.0f} Å, which a PDB file cannot hold.")
    sequences, atoms, serial = [], [], 1
    for letter, chain in zip(ONE_LETTER_CHAINS, chains, strict=False):
        tokens = np.flatnonzero((at["asym_id"] == chain) & at["attention_mask"].astype(bool))
        polymer = tokens[at["mol_type"][tokens] != LIGAND]
        numbers = {int(at["residue_index"][token]): component(at, token) for token in polymer}
        sequences += seqres_lines(letter, list(numbers.values()))
        last = ""
        for atom in valid[np.isin(at["atom_to_token"][valid], tokens)]:
            token = at["atom_to_token"][atom]
            record = "HETATM" if at["mol_type"][token] == LIGAND else "ATOM"
            last = f"{component(at, token):>3s} {letter}{at['residue_index'][token] + 1:4d}"
            symbol = SYMBOLS[at["ref_element"][atom]].upper()
            name = decode_name(at["ref_atom_name_chars"][atom])
            label = f"{name:4s}" if len(name) == 4 or len(symbol) == 2 else f" {name:<3s}"
            x, y, z = map(half_up, coords[atom])
            atoms.append(
                f"{record:6s}{serial:5d} {label} {last}    {x:8.3f}{y:8.3f}{z:8.3f}"
                f"{1:6.2f}{half_up(100 * plddt[atom]):6.2f}          {symbol:>2s}"
            )
            serial += 1
        if len(polymer):
            atoms.append(f"TER   {serial:5d}      {last}")
            serial += 1
    cell = "CRYST1    1.000    1.000    1.000  90.00  90.00  90.00 P 1"  # required by the format; no crystal
    lines = [*title_lines(title), *sequences, cell, *atoms, "END"]
    return "".join(f"{line:80s}\n" for line in lines)


def component(features: Mapping[str, np.ndarray], token: Any) -> str:
    """Return the name of a token's residue in structure files."""
    if features["mol_type"][token] == LIGAND:
        return LIGAND_NAME
    return COMPONENTS.get(int(features["res_type"][token]), "UNK")
