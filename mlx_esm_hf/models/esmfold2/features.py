"""The features of ESMFold2: chains, residues, atoms and alignments as arrays.

Names, dtypes and values are those of transformers' `prepare_protein_features` for a single chain, and those of Biohub's
`esm` package for complexes and alignments. Ligands, nucleic acids and modified residues are features of the same names
that the caller makes: a token for each residue or nucleotide, and one for each atom of anything else.

In shapes, B is the batch, L the tokens, A the atoms and M the rows of an alignment.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_esm_hf.data.source import read_fasta
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_inputs import as_array, to_numpy
from mlx_esm_hf.models.esmfold2.residues import GAP, INPUT_IDS, PROTEIN, RES_TYPES, encode_name, residue_atoms

ATOM_MULTIPLE = 32  # atoms are padded to a multiple

# {name: axes after the batch, upper bound of the values (None: any)}
TOKEN_FEATURES = {
    **dict.fromkeys(("token_index", "residue_index", "asym_id", "sym_id", "entity_id"), ("L", None)),
    "mol_type": ("L", 4),
    "res_type": ("L", 33),
    "attention_mask": ("L", 2),
    "distogram_atom_idx": ("L", "A"),
    "token_bonds": ("LL1", None),
}
ATOM_FEATURES = {
    "ref_pos": ("A3", None),
    "ref_charge": ("A", None),
    "ref_element": ("A", 128),
    "ref_atom_name_chars": ("A4", 64),
    "ref_space_uid": ("A", None),
    "atom_to_token": ("A", "L"),
    "atom_attention_mask": ("A", 2),
}
OPTIONAL_FEATURES = {
    "input_ids": ("L", None),
    "deletion_mean": ("L", None),
    "msa": ("ML", 33),
    "msa_attention_mask": ("ML", 2),
    "has_deletion": ("ML", 2),
    "deletion_value": ("ML", None),
}
FEATURES: dict[str, tuple[str, Any]] = {**TOKEN_FEATURES, **ATOM_FEATURES, **OPTIONAL_FEATURES}
REQUIRED = tuple(name for name in FEATURES if name not in (*OPTIONAL_FEATURES, "token_bonds"))
MASKS = ("attention_mask", "atom_attention_mask", "msa_attention_mask")
REALS = ("token_bonds", "ref_pos", "ref_charge", "deletion_mean", "deletion_value")


# Alignments


class Msa(NamedTuple):
    """The alignment of a chain of L residues.

    Attributes:
        rows: [M, L], residue types; the first row is the chain.
        deletions: [M, L], insertions of each row before a column.
        keys: of each row, the text after `key=` in its title, "" if it has none. Rows of two chains with the same key
            are from the same organism.
        unknown: letters that were replaced by X.
    """

    rows: np.ndarray
    deletions: np.ndarray
    keys: list[str]
    unknown: int


def read_a3m(path: str | os.PathLike[str], chain: str, max_rows: int | None = None) -> Msa:
    """Read an alignment in A3M format, plain or compressed: lower-case letters are insertions, and `-` is a gap.

    Args:
        path: the file.
        chain: sequence of the chain, which must be the first row.
        max_rows: rows to read; None for all.

    Raises:
        UserError: the file is not A3M, its first row is another sequence, or rows have different lengths.
    """
    rows: list[list[int]] = []
    deletions, keys, unknown = [], [], 0
    for where, title, sequence in read_fasta(os.fspath(path), titles=True):
        if max_rows is not None and len(rows) == max_rows:
            break
        letters = re.sub(r"[\s.]", "", sequence)
        aligned = re.sub(r"[a-z]", "", letters)
        if not rows and (place := difference(aligned, chain)) is not None:
            raise UserError(
                f"{where}: the first row of the alignment must be the chain, but differs from it at residue {place}."
            )
        if len(aligned) != len(chain):
            raise UserError(
                f"{where}: the row has {len(aligned)} columns, expected {len(chain)} (without insertions, which are "
                "lower-case)."
            )
        inserted = np.diff([match.start() for match in re.finditer(r"[^a-z]", letters)], prepend=-1) - 1
        rows.append([GAP if letter == "-" else RES_TYPES.get(letter, RES_TYPES["X"]) for letter in aligned])
        unknown += sum(letter not in RES_TYPES and letter != "-" for letter in aligned)
        deletions.append(inserted)
        key = re.search(r"\bkey=(\S+)", title)
        keys.append(key.group(1) if key else "")
    if not rows:
        raise UserError(f"{os.fspath(path)} contains no alignment: the file is empty.")
    return Msa(np.array(rows, dtype=np.int64), np.array(deletions, dtype=np.int64), keys, unknown)


def difference(a: str, b: str) -> int | None:
    """Return the first place, from 1, at which two sequences differ; None if they are equal."""
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False), 1) if x != y), min(len(a), len(b)) + 1)


def joined_alignments(chains: Sequence[str], msas: Sequence[Msa | None]) -> Msa:
    """Return the alignments of all chains as one with all columns.

    The first row has the chains. Rows of different chains with the same key are one row, in the order of the first
    chain that has them. The other rows of different chains are placed side by side, with gaps after the last one.
    """
    parts = [
        Msa(np.array([[RES_TYPES[x] for x in chain]]), np.zeros((1, len(chain)), dtype=np.int64), [""], 0)
        if msa is None
        else msa
        for chain, msa in zip(chains, msas, strict=True)
    ]
    places: list[dict[str, int]] = []  # of each chain, {key: first row with it}
    for part in parts:
        first: dict[str, int] = {}
        for row, key in enumerate(part.keys):
            if row and key:
                first.setdefault(key, row)
        places.append(first)
    shared = [key for key in dict.fromkeys(k for p in places for k in p) if sum(key in p for p in places) > 1]
    rows: list[list[int | None]] = [[0] * len(parts)]
    rows += [[place.get(key) for place in places] for key in shared]
    taken = [{row[i] for row in rows} for i in range(len(parts))]
    left = [[row for row in range(1, len(part.rows)) if row not in taken[i]] for i, part in enumerate(parts)]
    rows += [[x[n] if n < len(x) else None for x in left] for n in range(max(map(len, left)))]
    columns, deletions = [], []
    for i, part in enumerate(parts):
        index = np.array([-1 if row[i] is None else row[i] for row in rows])
        there = (index >= 0)[:, None]
        columns.append(np.where(there, part.rows[index], GAP))
        deletions.append(np.where(there, part.deletions[index], 0))
    return Msa(np.concatenate(columns, axis=1), np.concatenate(deletions, axis=1), [], sum(p.unknown for p in parts))


# Proteins


def protein_features(sequence: str, msas: Sequence[Msa | None] | None = None) -> dict[str, np.ndarray]:
    """Return the features of a protein, each with a batch of 1.

    Args:
        sequence: letters of the 20 amino acids and X, with ":" between chains.
        msas: an alignment for each chain, or None for a chain without.

    Returns:
        {name: array}. Tokens, one for each residue: `token_index`, `residue_index` (from 0 in each chain), `asym_id`
        (chain), `entity_id` (sequence of the chain, from 1), `sym_id` (number of the copy), `mol_type` (0), `res_type`,
        `input_ids` (ESMC's vocabulary), `distogram_atom_idx` (the representative atom), `attention_mask`, `token_bonds`
        [1, L, L, 1] and `deletion_mean`. Atoms: `ref_pos` [1, A, 3] in Å, `ref_charge`, `ref_element`,
        `ref_atom_name_chars` [1, A, 4], `ref_space_uid`, `atom_to_token` and `atom_attention_mask`. Alignment, [1, M,
        L] each: `msa`, `msa_attention_mask`, `has_deletion` and `deletion_value`.

    Raises:
        UserError: an empty chain, a letter that is no residue, or alignments that do not fit.

    Source: transformers, models/esmfold2/protein_utils.py, prepare_protein_features.
    """
    chains = sequence.split(":")
    for chain in chains:
        if not chain:
            raise UserError(f"{shortened(sequence)} has an empty chain.")
        if wrong := next((letter for letter in chain if letter not in RES_TYPES), None):
            raise UserError(
                f"{shortened(sequence)} has {wrong!r}, which is no residue: expected the 20 amino acids, X, and ':' "
                "between chains."
            )
    msas = msas or [None] * len(chains)
    if len(msas) != len(chains):
        raise UserError(f"msas must have one entry for each chain, {len(chains)}, got {len(msas)}.")
    table = residue_atoms()
    letters = "".join(chains)
    L = len(letters)
    lengths = [len(chain) for chain in chains]
    entities = {chain: number for number, chain in enumerate(dict.fromkeys(chains), start=1)}
    copies = [chains[:number].count(chain) for number, chain in enumerate(chains)]
    residues = [table[letter] for letter in letters]
    sizes = [len(residue.names) for residue in residues]
    starts = np.cumsum([0, *sizes[:-1]])
    atom_to_token = np.repeat(np.arange(L), sizes)
    msa = joined_alignments(chains, msas)
    tokens = {
        "token_index": np.arange(L),
        "residue_index": np.concatenate([np.arange(n) for n in lengths]),
        "asym_id": np.repeat(np.arange(len(chains)), lengths),
        "sym_id": np.repeat(copies, lengths),
        "entity_id": np.repeat([entities[chain] for chain in chains], lengths),
        "mol_type": np.full(L, PROTEIN),
        "res_type": np.array([RES_TYPES[letter] for letter in letters]),
        "input_ids": np.array([INPUT_IDS[letter] for letter in letters]),
        "distogram_atom_idx": starts + [residue.representative for residue in residues],
    }
    names = [encode_name(name) for residue in residues for name in residue.names]
    atoms: dict[str, np.ndarray] = {
        "ref_pos": np.concatenate([residue.positions for residue in residues]),
        "ref_charge": np.concatenate([residue.charges for residue in residues]),
        "ref_element": np.concatenate([residue.elements for residue in residues]),
        "ref_atom_name_chars": np.array(names),
        "ref_space_uid": atom_to_token,
        "atom_to_token": atom_to_token,
        "atom_attention_mask": np.ones(len(atom_to_token), dtype=bool),
    }
    rest = -len(atom_to_token) % ATOM_MULTIPLE
    features: dict[str, Any] = {name: array.astype(np.int64) for name, array in tokens.items()}
    features |= {name: np.pad(x, [(0, rest)] + [(0, 0)] * (x.ndim - 1)) for name, x in atoms.items()}
    features |= {
        "token_bonds": np.zeros((L, L, 1), dtype=np.float32),
        "attention_mask": np.ones(L, dtype=bool),
        "msa": msa.rows.astype(np.int64),
        "msa_attention_mask": np.ones(msa.rows.shape, dtype=bool),
        "has_deletion": msa.deletions > 0,
        # Biohub's scaling: π/2 · atan, where AlphaFold has 2/π · atan.
        "deletion_value": (math.pi / 2 * np.arctan(msa.deletions / 3)).astype(np.float32),
        "deletion_mean": msa.deletions.mean(axis=0).astype(np.float32),
    }
    return {name: array[None] for name, array in features.items()}


def shortened(sequence: str) -> str:
    """Return a sequence for messages."""
    return repr(f"{sequence[:40]}..." if len(sequence) > 40 else sequence)


# Batches


def pad_features(proteins: Sequence[Mapping[str, Any]]) -> dict[str, mx.array]:
    """Return proteins, each with a batch of 1, as one batch: padded on the right with zeros, and masks with False."""
    names = [name for name in FEATURES if all(name in protein for protein in proteins)]
    batch = {}
    for name in names:
        arrays = [np.array(protein[name]) for protein in proteins]
        shape = np.max([array.shape for array in arrays], axis=0)
        padded = [np.pad(x, [(0, most - n) for n, most in zip(x.shape, shape, strict=True)]) for x in arrays]
        batch[name] = mx.array(np.concatenate(padded))
    return batch


def check_features(features: Mapping[str, Any]) -> dict[str, mx.array]:
    """Return features as MLX arrays with boolean masks, after checking them.

    Args:
        features: {name: an `mx.array`, NumPy array, list or torch tensor}; see `protein_features`. Those of alignments,
            `input_ids`, `deletion_mean` and `token_bonds` may be missing or None.

    Raises:
        TypeError: an unknown name.
        UserError: a feature is missing or has a wrong shape, or values are out of range.
    """
    given = {name: value for name, value in features.items() if value is not None}
    if unknown := given.keys() - FEATURES.keys():
        raise TypeError(
            f"Unknown argument {', '.join(map(repr, sorted(unknown)))}; the features are {', '.join(FEATURES)}."
        )
    if missing := [name for name in REQUIRED if name not in given]:
        raise UserError(f"The features lack {', '.join(missing)}; protein_features makes them from a sequence.")
    arrays = {name: as_array(value) for name, value in given.items()}
    if arrays["attention_mask"].ndim != 2 or arrays["atom_attention_mask"].ndim != 2:
        raise UserError("attention_mask must be [batch, tokens] and atom_attention_mask [batch, atoms].")
    B, L = arrays["attention_mask"].shape
    sizes = {"L": L, "A": arrays["atom_attention_mask"].shape[1], "1": 1, "3": 3, "4": 4}
    sizes["M"] = arrays["msa"].shape[1] if "msa" in arrays and arrays["msa"].ndim == 3 else 1
    for name, array in arrays.items():
        axes, bound = FEATURES[name]
        shape = (B, *(sizes[axis] for axis in axes))
        if array.shape != shape:
            raise UserError(f"{name} must have the shape {shape}, got {array.shape}.")
        if name not in REALS and mx.issubdtype(array.dtype, mx.floating):
            raise UserError(f"{name} must be integers or booleans, got {array.dtype}.")
        most = sizes.get(bound, bound) if isinstance(bound, str) else bound
        values = to_numpy(array)
        if most is not None and values is not None and values.size and not 0 <= values.min() <= values.max() < most:
            wrong = values[(values < 0) | (values >= most)][0]
            raise UserError(f"{name} must be from 0 to {most - 1}, got {wrong}.")
        if name in MASKS:
            arrays[name] = array.astype(mx.bool_)
    check_masks(arrays)
    return arrays


def check_masks(arrays: Mapping[str, mx.array]) -> None:
    """Check that every protein has tokens and atoms, with padding on the right.

    Raises:
        UserError: a protein is empty, or padding precedes tokens.
    """
    mask, atoms = to_numpy(arrays["attention_mask"]), to_numpy(arrays["atom_attention_mask"])
    if mask is None or atoms is None:
        return
    if not (mask.any(axis=1).all() and atoms.any(axis=1).all()):
        raise UserError("attention_mask and atom_attention_mask must have a token and an atom in each row.")
    if (np.diff(mask.astype(np.int8), axis=1) > 0).any():
        raise UserError("attention_mask must have padding on the right only.")
