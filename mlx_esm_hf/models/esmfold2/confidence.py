"""The confidence head of ESMFold2: how reliable the atoms, the pairs and the interfaces of a structure are.

It is run for one protein without padding, a few samples at a time. In shapes, S is the samples, A the atoms, L the
tokens, C the width of a pair's state and K the chains.

Source: Abramson et al. 2024 (doi:10.1038/s41586-024-07487-w), Supplement, section 4.3 and Algorithm 31.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_esm_hf import ops
from mlx_esm_hf.modeling_inputs import to_numpy
from mlx_esm_hf.modeling_layers import Embedding, FrozenBuffers, LayerNorm, Linear, Module
from mlx_esm_hf.models.esmfold2.trunk import MLXEsmFold2PairUpdateStack
from mlx_esm_hf.ops.pairs import by_rows, rows_at_a_time
from mlx_esm_hf.runtime.memory import evaluate

MAX_ERROR = 32.0  # upper edge of the last bin of aligned and distance errors, in Å
LIGAND = 3  # the molecule type
CONTACT = 8.0  # distance of the representative atoms of tokens at an interface, in Å
LIGAND_WEIGHT = 2.0  # of a ligand's atoms in the pLDDT of interfaces
ATOM_CA = (ord("C") - 32, ord("A") - 32, 0, 0)  # name of the atom in `ref_atom_name_chars`
CARBON = 6


def categorical_mean(logits: mx.array, end: float) -> mx.array:
    """Return the mean [...] of distributions over equal bins from 0 to `end`, given by logits [..., bins]."""
    bins = logits.shape[-1]
    centers = (np.arange(bins, dtype=np.float32) + 0.5) * np.float32(end / bins)
    return ops.softmax(logits.astype(mx.float32)) @ mx.array(centers)


def places_in_token(atom_to_token: np.ndarray) -> np.ndarray:
    """Return the index [A] of each atom among the atoms of its token, which are adjacent."""
    first = np.append(True, atom_to_token[1:] != atom_to_token[:-1])
    starts = np.flatnonzero(first)
    return np.arange(len(atom_to_token)) - starts[np.cumsum(first) - 1]


def alpha_atoms(features: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the index [L] of each token's Cα; for a token without one, its representative atom."""
    index = features["distogram_atom_idx"].copy()
    is_alpha = (features["ref_atom_name_chars"] == ATOM_CA).all(axis=-1) & (features["ref_element"] == CARBON)
    for atom in np.flatnonzero(is_alpha & features["atom_attention_mask"].astype(bool)):
        index[features["atom_to_token"][atom]] = atom
    return index


def squared_distances(x: mx.array) -> mx.array:
    """Return the squared distances [S, L, L] of positions [S, L, 3]."""
    differences = (x[:, :, None, axis] - x[:, None, :, axis] for axis in range(3))
    return sum((d * d for d in differences), start=mx.array(0.0))


class MLXEsmFold2RowAttentionPooling(Module):
    """States of tokens from those of pairs, by attention along each row: [S, L, L, C] to [S, L, hidden_size]."""

    def __init__(self, config: Any):
        super().__init__()
        self.attn_proj = Linear(config.pairwise_hidden_size, 1, bias=False)
        self.out_proj = Linear(config.pairwise_hidden_size, config.hidden_size, bias=False)

    def __call__(self, z: mx.array) -> mx.array:
        """Return the states of the tokens."""
        weights = ops.softmax(self.attn_proj(z).squeeze(-1))
        return self.out_proj((weights[:, :, None] @ z).squeeze(2))


class MLXEsmFold2ConfidenceInputEmbedder(Module):
    """Pair states [1, L, L, C] of the head from those of the trunk and the states of the tokens."""

    def __init__(self, config: Any):
        super().__init__()
        width, C = config.single_inputs_size, config.pairwise_hidden_size
        self.single_inputs_norm = LayerNorm(width)
        self.pair_norm = LayerNorm(C)
        self.single_to_pair = Linear(width, C, bias=False)
        self.single_to_pair_transpose = Linear(width, C, bias=False)
        self.single_to_pair_prod_in1 = Linear(width, C, bias=False)
        self.single_to_pair_prod_in2 = Linear(width, C, bias=False)
        self.single_to_pair_prod_out = Linear(C, C, bias=False)

    def __call__(self, single_inputs: mx.array, z: mx.array, relative: mx.array, bonds: mx.array | None) -> mx.array:
        """Return the pair states.

        Args:
            single_inputs: [1, L, single_inputs_size].
            z: [1, L, L, C], from the trunk.
            relative: [1, L, L, C], relative positions.
            bonds: [1, L, L, C], or None without bonds.
        """
        s = self.single_inputs_norm(single_inputs)
        left, right = self.single_to_pair_prod_in1(s), self.single_to_pair_prod_in2(s)
        row, column = self.single_to_pair(s), self.single_to_pair_transpose(s)

        def step(z: mx.array, relative: mx.array, bonds: mx.array | None, left: mx.array, row: mx.array) -> mx.array:
            added = self.single_to_pair_prod_out(left[:, :, None] * right[:, None])
            z = self.pair_norm(z) + relative + row[:, :, None] + column[:, None] + added
            return z if bonds is None else z + bonds

        return by_rows(step, rows_at_a_time(z[:, :1].size), z, relative, bonds, left, row)


class MLXEsmFold2ConfidenceHead(FrozenBuffers):
    """Confidence of structures: pLDDT, aligned and distance errors, resolved atoms, pTM and ipTM."""

    frozen = ("boundaries",)

    def __init__(self, config: Any):
        super().__init__()
        head, C = config.confidence_head, config.pairwise_hidden_size
        self.eps = head.eps
        self.boundaries = mx.linspace(head.min_dist, head.max_dist, head.distogram_bins - 1)
        self.dist_bin_pairwise_embed = Embedding(head.distogram_bins, C)
        self.input_embedder = MLXEsmFold2ConfidenceInputEmbedder(config)
        self.row_attention_pooling = MLXEsmFold2RowAttentionPooling(config)
        self.folding_trunk = MLXEsmFold2PairUpdateStack(config, head.num_hidden_layers)
        self.plddt_layernorm = LayerNorm(config.hidden_size)
        self.plddt_weight = mx.zeros((config.max_atoms_per_token, config.hidden_size, head.num_plddt_bins))
        self.pae_layernorm = LayerNorm(C)
        self.pae_head = Linear(C, head.num_pae_bins, bias=False)
        self.pde_layernorm = LayerNorm(C)
        self.pde_head = Linear(C, head.num_pde_bins, bias=False)
        self.resolved_layernorm = LayerNorm(config.hidden_size)
        self.resolved_weight = mx.zeros((config.max_atoms_per_token, config.hidden_size, 2))

    def __call__(
        self,
        z: mx.array,
        coords: mx.array,
        features: Mapping[str, mx.array],
        num_chains: int | None = None,
    ) -> dict[str, mx.array]:
        """Return the confidence of samples of one protein; see `MLXEsmFold2Output`.

        Args:
            z: [1, L, L, C], result of `input_embedder`; the samples share it.
            coords: [S, A, 3], in Å.
            features: of this protein, without padding tokens, with batch 1.
            num_chains: K; None for the highest chain of this protein and 1.
        """
        representative = mx.take(coords, features["distogram_atom_idx"][0], axis=1)
        squared = squared_distances(representative.astype(mx.float32))
        single, z = self.states(z, squared)
        atoms = self.atom_confidence(single, squared, features)
        pae_logits, pde_logits = self.pae_head(self.pae_layernorm(z)), self.pde_head(self.pde_layernorm(z))
        errors = {
            "pae_logits": pae_logits,
            "pae": categorical_mean(pae_logits, MAX_ERROR),
            "pde_logits": pde_logits,
            "pde": categorical_mean(pde_logits, MAX_ERROR),
        }
        asym = features["asym_id"][0]
        chains = int(asym.max()) + 1 if num_chains is None else num_chains
        return atoms | errors | self.tm_scores(pae_logits, asym, chains)

    def states(self, z: mx.array, squared: mx.array) -> tuple[mx.array, mx.array]:
        """Return the states of tokens [S, L, hidden_size] and pairs [S, L, L, C], in the head's dtype.

        Args:
            z: [1, L, L, C].
            squared: [S, L, L], squared distances of the representative atoms, in Å².
        """
        bins = mx.zeros(squared.shape, dtype=mx.int32)
        distances = mx.sqrt(squared)
        for edge in self.boundaries:
            bins = bins + (distances > edge)
        z = z + self.dist_bin_pairwise_embed(bins)
        evaluate(z)
        inputs = z.astype(ops.computing_dtype(self.pae_head.weight.dtype))
        mask = mx.ones(z.shape[:2], dtype=inputs.dtype)
        z = z + self.folding_trunk(inputs, mask)  # the output of the stack contains its input, which counts twice
        z = z.astype(inputs.dtype)
        evaluate(z)
        return self.row_attention_pooling(z), z

    def atom_confidence(
        self, single: mx.array, squared: mx.array, features: Mapping[str, mx.array]
    ) -> dict[str, mx.array]:
        """Return pLDDT and the logits of resolved atoms.

        Args:
            single: [S, L, hidden_size].
            squared: [S, L, L], squared distances of the representative atoms, in Å².
            features: of this protein.
        """
        arrays = {name: np.array(array)[0] for name, array in features.items() if to_numpy(array) is not None}
        token = mx.array(arrays["atom_to_token"])
        place = np.minimum(places_in_token(arrays["atom_to_token"]), len(self.plddt_weight) - 1)
        plddt_logits = by_place(self.plddt_layernorm(single), self.plddt_weight, token, mx.array(place))
        resolved_logits = by_place(self.resolved_layernorm(single), self.resolved_weight, token, mx.array(place))
        plddt = categorical_mean(plddt_logits, 1.0)
        mask = features["atom_attention_mask"].astype(mx.float32)
        sums = mx.zeros(single.shape[:2]).at[:, token].add(plddt * mask)
        counts = mx.zeros((1, single.shape[1])).at[:, token].add(mask)

        is_ligand = features["mol_type"] == LIGAND
        asym = features["asym_id"]
        other = (asym[:, :, None] != asym[:, None]) & (squared < CONTACT**2)
        weights = mx.where(is_ligand, LIGAND_WEIGHT, other.any(axis=-1).astype(mx.float32))
        weights = mx.take(weights, token, axis=1) * mask
        return {
            "plddt_logits": plddt_logits,
            "plddt": sums / mx.maximum(counts, 1e-6),
            "plddt_per_atom": plddt,
            "plddt_ca": mx.take(plddt, mx.array(alpha_atoms(arrays)), axis=1),
            "complex_plddt": (plddt * mask).sum(axis=-1) / (mask.sum(axis=-1) + self.eps),
            "complex_iplddt": (plddt * weights).sum(axis=-1) / (weights.sum(axis=-1) + self.eps),
            "resolved_logits": resolved_logits,
        }

    def tm_scores(self, pae_logits: mx.array, asym: mx.array, num_chains: int) -> dict[str, mx.array]:
        """Return the predicted TM-scores of the complex, its interfaces and each pair of chains.

        Args:
            pae_logits: [S, L, L, bins].
            asym: [L], chains.
            num_chains: K.

        Source: Evans et al. 2022 (doi:10.1101/2021.10.04.463034), section 2.5; Zhang and Skolnick 2004 for the length.
        """
        bins, L = pae_logits.shape[-1], len(asym)
        centers = (np.arange(bins, dtype=np.float32) + 0.5) * np.float32(MAX_ERROR / bins)
        d0 = 1.24 * (max(L, 19) - 15) ** (1 / 3) - 1.8
        terms = mx.array((1 / (1 + (centers / d0) ** 2)).astype(np.float32))
        expected = ops.softmax(pae_logits.astype(mx.float32)) @ terms  # [S, L, L]
        other = (asym[:, None] != asym).astype(mx.float32)
        interface = (expected * other).sum(axis=-1) / (other.sum(axis=-1) + self.eps)
        pairs = mx.zeros((len(expected), num_chains, num_chains))
        chains = np.array(asym)
        for first in np.unique(chains):
            mean = expected[:, :, mx.array(np.flatnonzero(chains == first))]
            mean = mean.sum(axis=-1) / (mean.shape[-1] + self.eps)
            for second in np.unique(chains):
                pairs[:, int(first), int(second)] = mean[:, mx.array(np.flatnonzero(chains == second))].max(axis=-1)
        return {
            "ptm": (expected.sum(axis=-1) / (L + self.eps)).max(axis=-1),
            "iptm": interface.max(axis=-1),
            "pair_chains_iptm": pairs,
        }


def by_place(states: mx.array, weight: mx.array, token: mx.array, place: mx.array) -> mx.array:
    """Multiply each atom's token by the matrix of the atom's place: [S, L, D] to [S, A, outputs].

    The product with all matrices, and then a choice, is faster than a matrix for each atom.

    Args:
        states: [S, L, D].
        weight: [places, D, outputs].
        token: [A], index of each atom's token.
        place: [A], index of each atom's matrix.
    """
    places, D, outputs = weight.shape
    products = states @ weight.transpose(1, 0, 2).reshape(D, -1).astype(states.dtype)
    return mx.unflatten(products, -1, (places, outputs))[:, token, place]
