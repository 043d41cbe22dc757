"""Proteins as text and arrays: residues of a sequence, rows of a batch, checks of inputs, and PDB files."""

from __future__ import annotations

import textwrap
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_inputs import as_array, to_numpy
from mlx_esm_hf.models.esmfold.residue_constants import ATOM37, RESIDUE_NAMES, RESTYPES, RESTYPES_WITH_X

UNKNOWN = RESTYPES_WITH_X.index("X")
ONE_LETTER_CHAINS = ascii_uppercase + ascii_lowercase + digits
SEQRES_RESIDUES = 13  # per line


def check_folding_inputs(input_ids: Any, attention_mask: Any, position_ids: Any) -> tuple[mx.array, mx.array, mx.array]:
    """Convert the arguments of a folding model's call to int32 arrays [B, L] and check them.

    Returns:
        Residues, mask and positions.

    Raises:
        ValueError: see `MLXEsmForProteinFolding.__call__`.
    """
    aatype = as_array(input_ids)
    if aatype.ndim != 2 or 0 in aatype.shape or not mx.issubdtype(aatype.dtype, mx.integer):
        raise UserError(f"input_ids must be integers [batch, length], got {aatype.dtype} {aatype.shape}.")
    ids = to_numpy(aatype)
    if ids is not None and (ids.min() < 0 or ids.max() > UNKNOWN):
        wrong = ids[(ids < 0) | (ids > UNKNOWN)][0]
        raise UserError(
            f"input_ids must be residues, 0 to {UNKNOWN} for {RESTYPES_WITH_X}, got {wrong}. Use the tokenizer of the "
            "folding checkpoint with add_special_tokens=False."
        )
    mask = mx.ones(aatype.shape, dtype=mx.int32) if attention_mask is None else as_array(attention_mask)
    if mask.shape != aatype.shape:
        raise UserError(f"attention_mask must have the shape of input_ids, {aatype.shape}, got {mask.shape}.")
    mask = mask.astype(mx.int32)
    values = to_numpy(mask)
    if values is not None:
        if not np.isin(values, (0, 1)).all():
            raise UserError("attention_mask must be 1 for residues and 0 for padding.")
        if (values[:, 0] == 0).any() or (np.diff(values, axis=1) > 0).any():
            raise UserError(
                "attention_mask must start with 1 and have padding on the right only. Tokenize with "
                "padding_side='right'."
            )
    if position_ids is None:
        positions = mx.arange(aatype.shape[1])
    else:
        positions = as_array(position_ids)
        if not mx.issubdtype(positions.dtype, mx.integer):
            raise UserError(f"position_ids must be integers, got {positions.dtype}.")
    try:
        positions = mx.broadcast_to(positions.astype(mx.int32), aatype.shape)
    except ValueError as error:
        raise UserError(
            f"position_ids must have the shape of input_ids, {aatype.shape}, got {positions.shape}."
        ) from error
    return aatype.astype(mx.int32), mask, positions


def encode_sequence(
    sequence: str, residue_index_offset: int | None, chain_linker: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the residues, positions, chains and linker mask of a protein with its linkers, [L] each.

    Args:
        sequence: capital letters, with ":" between chains.
        residue_index_offset: jump of the positions from one chain to the next, in addition to the linker.
        chain_linker: residues between two chains.

    Raises:
        ValueError: an empty sequence or chain, or other characters than capital letters.
    """
    chains, linker, offset = sequence.split(":"), chain_linker or "", residue_index_offset or 0
    for chain in chains:
        if not (chain.isascii() and chain.isalpha() and chain.isupper()):
            name = f"{sequence[:40]}..." if len(sequence) > 40 else sequence
            raise UserError(
                f"{name!r} cannot be folded: a protein must be capital letters, A to Z, with ':' between chains, "
                "and no chain may be empty."
            )
    order = {letter: i for i, letter in enumerate(RESTYPES)}
    aatype = np.array([order.get(letter, UNKNOWN) for letter in linker.join(chains)], dtype=np.int32)
    lengths = [len(chain) for chain in chains]
    chain_index = np.repeat(np.arange(len(chains)), [n + len(linker) for n in lengths])[: len(aatype)].astype(np.int32)
    linkers = np.concatenate([np.repeat([0, 1], [n, len(linker)]) for n in lengths])[: len(aatype)].astype(np.int32)
    return aatype, np.arange(len(aatype), dtype=np.int32) + chain_index * offset, chain_index, linkers


def pad_rows(rows: list[np.ndarray], filler: int) -> mx.array:
    """Stack rows of different lengths, padded on the right with `filler`."""
    length = max(len(row) for row in rows)
    return mx.array(np.stack([np.pad(row, (0, length - len(row)), constant_values=filler) for row in rows]))


def pdb_text(
    aatype: np.ndarray,
    chain_index: np.ndarray,
    positions: np.ndarray,
    exists: np.ndarray,
    plddt: np.ndarray,
    title: str = "",
) -> str:
    """Return a protein as a PDB file: chains named from A, residues of each chain numbered from 1, pLDDT as B factor.

    Residues without atoms, such as X, are in the SEQRES records only.

    Args:
        aatype: [L].
        chain_index: [L], from 0; residues with −1 (padding, linkers) are skipped.
        positions: [L, 37, 3], in Å.
        exists: [L, 37], 1 for the atoms to write.
        plddt: [L, 37], 0 to 100.
        title: ASCII text for the TITLE records.

    Raises:
        ValueError: more chains than a PDB file has names for.
    """
    if (chains := int(chain_index.max()) + 1) > len(ONE_LETTER_CHAINS):
        raise UserError(f"A PDB file holds at most {len(ONE_LETTER_CHAINS)} chains, got {chains}. Write mmCIF instead.")
    sequences, atoms, serial = [], [], 1
    for name, chain in zip(ONE_LETTER_CHAINS, range(chains), strict=False):
        residues = np.flatnonzero(chain_index == chain)
        residue_names = [RESIDUE_NAMES[aatype[residue]] for residue in residues]
        sequences += seqres_lines(name, residue_names)
        last = ""
        for number, (residue, residue_name) in enumerate(zip(residues, residue_names, strict=True), start=1):
            for atom in np.flatnonzero(exists[residue]):
                label, last = ATOM37[atom], f"{residue_name} {name}{number:4d}"
                x, y, z = map(half_up, positions[residue, atom])
                b_factor = half_up(plddt[residue, atom])
                atoms.append(
                    f"ATOM  {serial:5d}  {label:<3s} {last}    {x:8.3f}{y:8.3f}{z:8.3f}"
                    f"{1:6.2f}{b_factor:6.2f}          {label[0]:>2s}"
                )
                serial += 1
        if last:
            atoms.append(f"TER   {serial:5d}      {last}")
            serial += 1
    cell = "CRYST1    1.000    1.000    1.000  90.00  90.00  90.00 P 1"  # required by the format; no crystal
    lines = [*title_lines(title), *sequences, cell, *atoms, "END"]
    return "".join(f"{line:80s}\n" for line in lines)


def half_up(x: float) -> float:
    """Return `x` shifted so that formatting rounds decimals that end in 5 upward, and does not print -0.000."""
    return 0.0 if -0.0005 <= x < 0 else float(x) + 1e-10


def title_lines(title: str) -> list[str]:
    """Return the TITLE records, which are upper-case."""
    lines = textwrap.wrap(title.upper(), 69)
    continued = [f"TITLE   {number:>2} {line}" for number, line in enumerate(lines[1:], start=2)]
    return [f"TITLE     {line}" for line in lines[:1]] + continued


def seqres_lines(chain: str, residues: list[str]) -> list[str]:
    """Return the SEQRES records of a chain."""
    rows = [residues[first : first + SEQRES_RESIDUES] for first in range(0, len(residues), SEQRES_RESIDUES)]
    return [f"SEQRES{number:4d} {chain} {len(residues):4d}  {' '.join(row)}" for number, row in enumerate(rows, 1)]
