"""The features of ESMFold2: chains, residues, atoms and alignments as arrays.

Names, dtypes and values are those of transformers' `prepare_protein_features` for a protein of one chain. Complexes and
alignments follow Biohub's `esm` package. The caller makes the features of ligands, nucleic acids and modified residues:
one token for each standard residue or nucleotide, and one token for each atom of anything else.

In shapes, B is the batch, L the tokens, A the atoms and M the rows of an alignment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_esm_hf.checks import check_integer, suggestion
from mlx_esm_hf.data.source import check_file, read_fasta
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_inputs import as_array
from mlx_esm_hf.models.esmfold2.residues import (
    GAP,
    INPUT_IDS,
    NUM_RES_TYPES,
    PROTEIN,
    RES_TYPES,
    UNKNOWN,
    residue_atoms,
)

ATOM_MULTIPLE = 32  # the number of atoms is padded to a multiple of it


class Feature(NamedTuple):
    """What an array of the features must be.

    Attributes:
        axes: sizes after the batch: letters (see the module) or digits.
        kind: dtype of the array in MLX.
        below: upper bound of integers that start from 0: a number or an axis; None for all integers.
        required: whether every dictionary of features has it.
    """

    axes: str
    kind: mx.Dtype = mx.int32
    below: int | str | None = None
    required: bool = True


FEATURES = {
    "token_index": Feature("L"),
    "residue_index": Feature("L"),
    "asym_id": Feature("L", below="L"),
    "sym_id": Feature("L"),
    "entity_id": Feature("L"),
    "mol_type": Feature("L", below=4),
    "res_type": Feature("L", below=NUM_RES_TYPES),
    "input_ids": Feature("L", below=64, required=False),
    "distogram_atom_idx": Feature("L", below="A"),
    "attention_mask": Feature("L", mx.bool_),
    "token_bonds": Feature("LL1", mx.float32, required=False),
    "ref_pos": Feature("A3", mx.float32),
    "ref_charge": Feature("A", mx.float32),
    "ref_element": Feature("A", below=128),
    "ref_atom_name_chars": Feature("A4", below=64),
    "ref_space_uid": Feature("A"),
    "atom_to_token": Feature("A", below="L"),
    "atom_attention_mask": Feature("A", mx.bool_),
    "msa": Feature("ML", below=NUM_RES_TYPES, required=False),
    "msa_attention_mask": Feature("ML", mx.bool_, required=False),
    "has_deletion": Feature("ML", mx.bool_, required=False),
    "deletion_value": Feature("ML", mx.float32, required=False),
    "deletion_mean": Feature("L", mx.float32, required=False),
}
AXES = {"L": "tokens", "A": "atoms", "M": "rows of the MSA"}


# Alignments

# Codes of the characters of an alignment in A3M format, beside the residue types.
INSERTION, OMITTED, INVALID = 253, 254, 255


def _codes() -> np.ndarray:
    codes = np.full(256, INVALID, dtype=np.uint8)
    codes[ord("A") : ord("Z") + 1] = UNKNOWN
    codes[ord("a") : ord("z") + 1] = INSERTION
    codes[ord("-")] = GAP
    codes[ord(".")] = OMITTED  # in A2M: another row has an insertion here
    for letter, number in RES_TYPES.items():
        codes[ord(letter)] = number
    return codes


CODES = _codes()
LETTERS = {number: letter for letter, number in RES_TYPES.items()} | {GAP: "-"}
PAIRING_KEY = re.compile(r"\bkey=(\S+)")


class Msa(NamedTuple):
    """The alignment of a chain.

    Attributes:
        rows: [M, L], residue types. The first row is the chain.
        deletions: [M, L], number of residues that a row has between a column and the previous one.
        keys: for each row, what follows `key=` in its title; "" if there is nothing or -1. Rows of different chains
            with the same key come from the same organism.
        unknown: number of letters other than the 20 residues and X, which were read as X.
        path: the file, for messages.
    """

    rows: np.ndarray
    deletions: np.ndarray
    keys: list[str]
    unknown: int = 0
    path: str = "The alignment"


def read_a3m(path: str | os.PathLike[str], max_rows: int | None = None) -> Msa:
    """Read the alignment of a chain in A3M format: lower-case letters are insertions, `-` is a gap.

    Args:
        path: a file, plain, gzip- or zstandard-compressed. Its first row is the chain.
        max_rows: number of rows to read; None for all.

    Raises:
        UserError: the file is not found, is not A3M or has no rows. The message names the file and the line.
    """
    if max_rows is not None:
        check_integer("max_rows", max_rows, 1)
    path = os.fspath(path)
    check_file(path, "an alignment in A3M format")
    rows: list[np.ndarray] = []
    deletions: list[np.ndarray] = []
    keys, unknown = [], 0
    for place, title, sequence in read_fasta(path, titles=True):
        letters = np.frombuffer("".join(sequence.split()).encode("ascii", "replace"), dtype=np.uint8)
        codes = CODES[letters]
        if (wrong := np.flatnonzero(codes == INVALID)).size:
            raise UserError(f"{place}: {chr(letters[wrong[0]])!r} is not a residue or gap of an alignment (A3M).")
        columns = np.flatnonzero(codes < INSERTION)
        expected = len(rows[0]) if rows else len(columns)
        if len(columns) != expected or not expected:
            raise UserError(
                f"{place}: the row has {len(columns)} columns, expected {expected or 'at least 1'}, as in the first "
                "row. Lower-case letters are insertions and do not count."
            )
        key = PAIRING_KEY.search(title)
        rows.append(codes[columns])
        deletions.append(np.diff(np.cumsum(codes == INSERTION)[columns], prepend=0).astype(np.int32))
        keys.append(key[1] if key and key[1] != "-1" else "")
        unknown += int(((rows[-1] == UNKNOWN) & (letters[columns] != ord("X"))).sum())
        if len(rows) == max_rows:
            break
    if not rows:
        raise UserError(f"{path} contains no alignment: the file is empty.")
    return Msa(np.stack(rows), np.stack(deletions), keys, unknown, path)


def check_msa(msa: Msa, chain: str) -> None:
    """Refuse an alignment whose first row is not the chain.

    Raises:
        UserError: the message names the file and the first difference.
    """
    row, expected = msa.rows[0], [RES_TYPES[letter] for letter in chain]
    for number, (found, wanted) in enumerate(zip(row.tolist(), expected, strict=False), start=1):
        if found != wanted:
            raise UserError(
                f"{msa.path}: the first row must be the sequence of the chain, but residue {number} is "
                f"{LETTERS.get(found, found)}, expected {LETTERS[wanted]}."
            )
    if len(row) != len(chain):
        raise UserError(
            f"{msa.path}: the first row must be the sequence of the chain, but has {len(row)} residues, expected "
            f"{len(chain)}."
        )


def join_msas(chains: Sequence[str], msas: Sequence[Msa | None]) -> tuple[np.ndarray, np.ndarray]:
    """Return one alignment of all chains: residue types and numbers of deletions, [M, L] each.

    The first row has the chains. Next come the rows whose key several chains have, the keys of most chains first; a
    chain without the key takes its next unpaired row. The other unpaired rows follow, one of each chain side by side. A
    chain that has no more rows has gaps.

    Source: Biohub's esm, models/esmfold2/paired_msa.py, construct_paired_msa.
    """
    parts = []
    for chain, msa in zip(chains, msas, strict=True):
        if msa is None:
            row = np.array([[RES_TYPES[letter] for letter in chain]])
            msa = Msa(row, np.zeros_like(row), [""])
        check_msa(msa, chain)
        parts.append(msa)
    paired, used = _paired_rows([msa.keys for msa in parts])
    rest = [[row for row in range(1, len(msa.rows)) if row not in rows] for msa, rows in zip(parts, used, strict=True)]
    unpaired = [iter(rows) for rows in rest]
    plan = [[0] * len(parts)]
    for pairing in paired:  # a chain without the key takes its next row
        plan.append([next(rows, -1) if row < 0 else row for row, rows in zip(pairing, unpaired, strict=True)])
    plan += [list(rows) for rows in zip_longest(*unpaired, fillvalue=-1)]
    order = np.array(plan)
    rows, deletions = [], []
    for msa, places in zip(parts, order.T, strict=True):
        missing = (places < 0)[:, None]
        rows.append(np.where(missing, GAP, msa.rows[places]))
        deletions.append(np.where(missing, 0, msa.deletions[places]))
    return np.concatenate(rows, axis=1), np.concatenate(deletions, axis=1)


def _paired_rows(keys: Sequence[Sequence[str]]) -> tuple[list[list[int]], list[set[int]]]:
    """Return the rows that chains share by a key, and the rows of each chain that are used.

    Args:
        keys: the keys of each chain's rows.

    Returns:
        For each shared row, the row of each chain, −1 for a chain without the key. A chain that has a key in fewer rows
        than another chain repeats them. Then, for each chain, the rows that have a shared key.
    """
    places: dict[str, list[list[int]]] = {}  # {key: rows of each chain}
    for chain, names in enumerate(keys):
        for row, key in enumerate(names):
            if row > 0 and key:
                places.setdefault(key, [[] for _ in keys])[chain].append(row)
    shared = [rows for rows in places.values() if sum(map(bool, rows)) > 1]
    shared.sort(key=lambda rows: sum(map(bool, rows)), reverse=True)
    paired = [
        [rows[number % len(rows)] if rows else -1 for rows in chains]
        for chains in shared
        for number in range(max(map(len, chains)))
    ]
    used = [{row for rows in shared for row in rows[chain]} for chain in range(len(keys))]
    return paired, used


# Proteins


def protein_features(
    sequence: str, msas: Sequence[Msa | None] | None = None, max_rows: int | None = None
) -> dict[str, np.ndarray]:
    """Return the features of a protein, with a batch axis of 1.

    Args:
        sequence: letters of the 20 residues and X, with ":" between chains.
        msas: the alignment of each chain, or None for a chain without one.
        max_rows: number of rows of the joined alignments to keep; None for all.

    Returns:
        {name: array}. For tokens (residues) [1, L]: `token_index`, `residue_index` (from 0 in each chain), `asym_id`
        (the chain), `entity_id` (equal for equal chains, from 1), `sym_id` (number among equal chains), `mol_type`,
        `res_type`, `input_ids` (of ESMC), `distogram_atom_idx` (Cβ, or Cα if there is no Cβ), `attention_mask`,
        `deletion_mean`, and `token_bonds` [1, L, L, 1]. For atoms [1, A], with A a multiple of 32: `ref_pos` [1, A, 3]
        in Å, `ref_charge`, `ref_element`, `ref_atom_name_chars` [1, A, 4], `ref_space_uid`, `atom_to_token` and
        `atom_attention_mask`. For the alignment [1, M, L]: `msa`, `msa_attention_mask`, `has_deletion` and
        `deletion_value`.

    Raises:
        UserError: an empty chain, another letter, or alignments that do not match the chains.

    Source: transformers, models/esmfold2/protein_utils.py, prepare_protein_features.
    """
    chains = split_chains(sequence)
    if msas is None:
        msas = [None] * len(chains)
    if len(msas) != len(chains):
        raise UserError(f"msas must have one entry for each chain, expected {len(chains)}, got {len(msas)}.")
    if max_rows is not None:
        check_integer("max_rows", max_rows, 1)
    features = {
        **token_features(chains),
        **atom_features("".join(chains)),
        **msa_features(*(array[:max_rows] for array in join_msas(chains, msas))),
    }
    return {name: array[None] for name, array in features.items()}


def split_chains(sequence: str) -> list[str]:
    """Return the chains of a sequence.

    Raises:
        UserError: a chain is empty or has another letter than the 20 residues and X.
    """
    shown = repr(f"{sequence[:40]}..." if len(sequence) > 40 else sequence)
    chains = sequence.split(":")
    for number, chain in enumerate(chains, start=1):
        where = f", in chain {number}" if len(chains) > 1 else ""
        if not chain:
            raise UserError(f"{shown} cannot be folded: the sequence is empty{where}.")
        for place, letter in enumerate(chain, start=1):
            if letter not in RES_TYPES:
                raise UserError(
                    f"{shown} cannot be folded: {letter!r} at position {place}{where} must be a capital letter of the "
                    "20 residues or X, with ':' between chains."
                )
    return chains


def token_features(chains: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the features of the tokens of a protein, without the batch axis; see `protein_features`."""
    lengths = [len(chain) for chain in chains]
    letters = "".join(chains)
    entities = {chain: number for number, chain in enumerate(dict.fromkeys(chains), start=1)}
    copies = [chains[:number].count(chain) for number, chain in enumerate(chains)]
    table = residue_atoms()
    first_atoms = np.cumsum([0, *(len(table[letter].names) for letter in letters[:-1])])
    L = len(letters)
    integers = {
        "token_index": np.arange(L),
        "residue_index": np.concatenate([np.arange(length) for length in lengths]),
        "asym_id": np.repeat(np.arange(len(chains)), lengths),
        "sym_id": np.repeat(copies, lengths),
        "entity_id": np.repeat([entities[chain] for chain in chains], lengths),
        "mol_type": np.full(L, PROTEIN),
        "res_type": np.array([RES_TYPES[letter] for letter in letters]),
        "input_ids": np.array([INPUT_IDS[letter] for letter in letters]),
        "distogram_atom_idx": first_atoms + [table[letter].representative for letter in letters],
    }
    return {
        **{name: array.astype(np.int64) for name, array in integers.items()},
        "attention_mask": np.ones(L, dtype=bool),
        "token_bonds": np.zeros((L, L, 1), dtype=np.float32),
    }


def atom_features(letters: str) -> dict[str, np.ndarray]:
    """Return the features of the atoms of residues, padded with zeros, without the batch axis."""
    residues = [residue_atoms()[letter] for letter in letters]
    token = np.repeat(np.arange(len(letters), dtype=np.int64), [len(residue.names) for residue in residues])
    features = {
        "ref_pos": np.concatenate([residue.positions for residue in residues]),
        "ref_charge": np.concatenate([residue.charges for residue in residues]),
        "ref_element": np.concatenate([residue.elements for residue in residues]),
        "ref_atom_name_chars": np.concatenate([residue.chars for residue in residues]),
        "ref_space_uid": token,
        "atom_to_token": token,
        "atom_attention_mask": np.ones(len(token), dtype=bool),
    }
    missing = -len(token) % ATOM_MULTIPLE
    return {name: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for name, x in features.items()}


def msa_features(rows: np.ndarray, deletions: np.ndarray) -> dict[str, np.ndarray]:
    """Return the features of an alignment, without the batch axis.

    Args:
        rows: [M, L], residue types.
        deletions: [M, L], see `Msa`.
    """
    # Biohub's scale is π/2; AlphaFold's is 2/π.
    values = np.float32(np.pi / 2) * np.arctan(deletions.astype(np.float32) / 3)
    return {
        "msa": rows.astype(np.int64),
        "msa_attention_mask": np.ones(rows.shape, dtype=bool),
        "has_deletion": deletions > 0,
        "deletion_value": values,
        "deletion_mean": values.mean(axis=0),
    }


# Batches


def pad_features(proteins: Sequence[Mapping[str, Any]]) -> dict[str, mx.array]:
    """Return the features of proteins as one batch, padded on the right with zeros and masks with False.

    Args:
        proteins: for each protein, or batch of proteins, its features; see `protein_features`. The number of atoms is
            padded to a multiple of 32.

    Raises:
        TypeError: a name is not that of a feature.
        UserError: no proteins, or a feature is missing in one of them, or has a wrong shape or values.
    """
    if not proteins:
        raise UserError("Expected the features of at least one protein, got none.")
    checked = []
    for protein in proteins:
        arrays = check_features(protein)
        if "msa" in arrays and "msa_attention_mask" not in arrays:  # rows added as padding must not count
            arrays["msa_attention_mask"] = mx.broadcast_to(arrays["attention_mask"][:, None], arrays["msa"].shape)
        checked.append(arrays)
    names = [name for name in FEATURES if any(name in arrays for arrays in checked)]
    batch = {}
    for name in names:
        if missing := [number for number, arrays in enumerate(checked, start=1) if name not in arrays]:
            raise UserError(f"{name} is missing in protein {missing[0]} of the batch, but other proteins have it.")
        rows = [arrays[name] for arrays in checked]
        sizes = [max(row.shape[axis] for row in rows) for axis in range(1, rows[0].ndim)]
        if FEATURES[name].axes[0] == "A":
            sizes[0] += -sizes[0] % ATOM_MULTIPLE
        batch[name] = mx.concatenate([_padded(row, sizes) for row in rows])
    return batch


def _padded(x: mx.array, sizes: Sequence[int]) -> mx.array:
    """Return x [B, ...] padded on the right with zeros to these sizes after the batch."""
    return mx.pad(x, [(0, 0), *((0, size - length) for size, length in zip(sizes, x.shape[1:], strict=True))])


def check_features(features: Mapping[str, Any]) -> dict[str, mx.array]:
    """Return features as int32, float32 and bool arrays after checking them.

    Args:
        features: {name: `mx.array`, NumPy array, torch tensor or list}; see `protein_features`. Masks may be 0 and 1.
            `input_ids`, `token_bonds` and the features of the alignment may be missing or None.

    Raises:
        TypeError: a name is not that of a feature.
        UserError: a feature is missing, or has a wrong shape or values. The message names it.
    """
    arrays = {}
    for name, value in features.items():
        if name not in FEATURES:
            raise TypeError(f"{name!r} is not a feature of ESMFold2.{suggestion(name, FEATURES)}")
        if value is not None:
            arrays[name] = as_array(value)
    if missing := [name for name, feature in FEATURES.items() if feature.required and name not in arrays]:
        raise UserError(f"Features are missing: {', '.join(missing)}. See protein_features.")
    sizes = _sizes(arrays)
    values = {name: _check_feature(name, array, sizes) for name, array in arrays.items()}
    _check_layout(values)
    return {name: mx.array(array).astype(FEATURES[name].kind) for name, array in values.items()}


def _sizes(arrays: Mapping[str, mx.array]) -> dict[str, int]:
    """Return the size of each axis, from the masks and the alignment."""
    for name, axis in (("attention_mask", "tokens"), ("atom_attention_mask", "atoms")):
        shape = arrays[name].shape
        if len(shape) != 2 or 0 in shape:
            raise UserError(f"{name} must have shape [batch, {axis}], at least one of each, got {shape}.")
    B, L = arrays["attention_mask"].shape
    sizes = {"B": B, "L": L, "A": arrays["atom_attention_mask"].shape[1]}
    aligned = [name for name in arrays if FEATURES[name].axes == "ML"]
    if aligned and "msa" not in arrays:
        raise UserError(f"Features have {aligned[0]} but no msa.")
    if aligned:
        sizes["M"] = arrays["msa"].shape[1] if arrays["msa"].ndim == 3 else 1
        if sizes["M"] == 0:
            raise UserError("msa must have at least one row.")
    return sizes


def _check_feature(name: str, array: mx.array, sizes: Mapping[str, int]) -> np.ndarray:
    """Return the values of a feature after checking its shape, dtype and range."""
    feature = FEATURES[name]
    shape = tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in f"B{feature.axes}")
    if array.shape != shape:
        axes = ", ".join(AXES.get(axis, axis) for axis in feature.axes)
        raise UserError(f"{name} must have shape {shape} ([batch, {axes}]), got {array.shape}.")
    is_float = mx.issubdtype(array.dtype, mx.floating)
    values = np.array(array.astype(mx.float32) if is_float else array)
    if feature.kind == mx.bool_:
        if not np.isin(values, (0, 1)).all():
            raise UserError(f"{name} must be True or False (1 or 0), got {values[~np.isin(values, (0, 1))][0]}.")
        return values.astype(bool)
    if feature.kind == mx.float32:
        if not np.isfinite(values).all():
            raise UserError(f"{name} must be finite, got {values[~np.isfinite(values)][0]}.")
        return values
    if not mx.issubdtype(array.dtype, mx.integer):
        raise UserError(f"{name} must be integers, got {array.dtype}.")
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    if feature.below is not None:
        low, high = 0, (feature.below if isinstance(feature.below, int) else sizes[feature.below]) - 1
    outside = (values < low) | (values > high)
    if outside.any():
        raise UserError(f"{name} must be from {low} to {high}, got {values[outside][0]}.")
    return values


def _check_layout(values: Mapping[str, np.ndarray]) -> None:
    """Check that padding is on the right, and that tokens and atoms refer to each other rather than to padding."""
    for name in ("attention_mask", "atom_attention_mask"):
        mask = values[name]
        if not mask[:, 0].all():
            raise UserError(f"{name} must start with True in each row.")
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise UserError(f"{name} must have padding on the right only.")
    rows = np.arange(len(values["attention_mask"]))[:, None]
    atoms, token = values["atom_attention_mask"], values["atom_to_token"]
    if not values["attention_mask"][rows, token][atoms].all():
        raise UserError("atom_to_token must not refer to padding.")
    if not atoms[rows, values["distogram_atom_idx"]][values["attention_mask"]].all():
        raise UserError("distogram_atom_idx must not refer to padding.")
    for row, mask in zip(token, atoms, strict=True):
        starts = row[mask][np.flatnonzero(np.diff(row[mask], prepend=-1))]
        if len(np.unique(starts)) < len(starts):
            raise UserError("atom_to_token must keep the atoms of a token together.")
