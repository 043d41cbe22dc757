"""The trunk of ESMFold2: pair states that a recurrence updates, without attention.

From top to bottom: pair layers, the recurrence, relative positions, and the embedder of the input features.

MLX is lazy and would compute many steps together, with all their intermediates in memory. `evaluate` computes a step
before the next one is added to the graph.

In shapes, B is the batch, L the tokens (residues of a protein; atoms of a ligand) and C the width of a pair's state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_esm_hf import ops
from mlx_esm_hf.modeling_inputs import to_numpy
from mlx_esm_hf.modeling_layers import LayerNorm, Linear, Module, parameters_of
from mlx_esm_hf.models.esmfold2.atoms import MLXEsmFold2AtomEncoder, modulations_of
from mlx_esm_hf.models.esmfold2.layers import MLXEsmFold2Transition
from mlx_esm_hf.ops.pairs import Affine, by_rows, rows_at_a_time, triangle_multiplication
from mlx_esm_hf.runtime.memory import evaluate

# Pair layers


class MLXEsmFold2TriangleMultiplicativeUpdate(Module):
    """Update of each edge (i, j) from the edges of i and j to every third token k, [B, L, L, C] to the same shape.

    Source: Jumper et al. 2021, Supplement, Algorithms 11 and 12, with all projections of the edges in one layer.
    """

    def __init__(self, config: Any, outgoing: bool = True):
        super().__init__()
        C = config.pairwise_hidden_size
        self.outgoing = outgoing
        self.norm_start = LayerNorm(C)
        self.norm_mix = LayerNorm(C)
        self.proj_bundle = Linear(C, 4 * C, bias=False)
        self.proj_emit = Linear(C, C, bias=False)
        self.proj_gate = Linear(C, C, bias=False)

    def __call__(self, z: mx.array, mask: mx.array) -> mx.array:
        """Return the updated pair states.

        Args:
            z: [B, L, L, C].
            mask: [B, L], 0 at padding.
        """
        left, right, left_gate, right_gate = (Affine(w, None) for w in mx.split(self.proj_bundle.weight, 4))
        return triangle_multiplication(
            z,
            mask,
            parameters_of(self.norm_start),
            (left_gate, left),
            (right_gate, right),
            parameters_of(self.norm_mix),
            (parameters_of(self.proj_gate), parameters_of(self.proj_emit)),
            self.outgoing,
            residual=z,
        )


class MLXEsmFold2PairUpdateLayer(Module):
    """Both triangle multiplications and a transition, [B, L, L, C] to the same shape."""

    def __init__(self, config: Any):
        super().__init__()
        self.tri_mul_out = MLXEsmFold2TriangleMultiplicativeUpdate(config, outgoing=True)
        self.tri_mul_in = MLXEsmFold2TriangleMultiplicativeUpdate(config, outgoing=False)
        self.pair_transition = MLXEsmFold2Transition(
            config.pairwise_hidden_size, config.pair_transition_intermediate_size
        )

    def __call__(self, z: mx.array, mask: mx.array) -> mx.array:
        """Return the updated pair states; `mask` [B, L] is 0 at padding."""
        z = self.tri_mul_out(z, mask)
        evaluate(z)
        z = self.tri_mul_in(z, mask)
        evaluate(z)
        z = self.pair_transition(z)
        evaluate(z)
        return z


class MLXEsmFold2PairUpdateStack(Module):
    """Pair layers, one after the other."""

    def __init__(self, config: Any, num_layers: int):
        super().__init__()
        self.layers = [MLXEsmFold2PairUpdateLayer(config) for _ in range(num_layers)]

    def __call__(self, z: mx.array, mask: mx.array) -> mx.array:
        """Return the updated pair states [B, L, L, C]; `mask` [B, L] is 0 at padding."""
        for layer in self.layers:
            z = layer(z, mask)
        return z


# The recurrence


class MLXEsmFold2Parcae(Module):
    """The recurrence of the trunk's loops: in each, the pair states decay and get new input.

    The layers named `output_stack` follow the last loop.
    """

    def __init__(self, config: Any):
        super().__init__()
        C = config.pairwise_hidden_size
        self.input_norm = LayerNorm(C)
        self.log_state_decay = mx.zeros(C)
        self.log_delta = mx.zeros(C)
        self.input_matrix_continuous = mx.eye(C)
        self.out_proj = Linear(C, C, bias=False)
        self.output_stack = MLXEsmFold2PairUpdateStack(config, config.parcae_num_coda_layers)

    def discretize(self) -> tuple[mx.array, mx.array]:
        """Return the factor [C] by which the states decay, and the matrix [C, C] of the input, in float32."""
        delta = nn.softplus(self.log_delta.astype(mx.float32))
        decay = mx.exp(-delta * mx.exp(self.log_state_decay.astype(mx.float32)))
        return decay, delta[:, None] * self.input_matrix_continuous.astype(mx.float32)

    def __call__(self, state: mx.array, injected: mx.array) -> mx.array:
        """Return decay · state + matrix · norm(injected), all [B, L, L, C]."""
        decay, matrix = (x.astype(state.dtype) for x in self.discretize())

        def step(state: mx.array, injected: mx.array) -> mx.array:
            return ops.linear(self.input_norm(injected), matrix, residual=decay * state)

        return by_rows(step, rows_at_a_time(state[:, :1].size), state, injected)

    def decode_state(self, state: mx.array, mask: mx.array) -> mx.array:
        """Return the pair states [B, L, L, C] of the trunk from the state after the last loop."""
        z = self.out_proj(state)
        evaluate(z)
        return self.output_stack(z, mask)


def initial_std(width: int) -> float:
    """Return the standard deviation of the random states before the first loop.

    Source: Nguyen and Salazar 2019 (arXiv:1910.05895), section 2.2.
    """
    return math.sqrt(2 / (5 * width))


# The input


class MLXEsmFold2RelativePositionEncoding(Module):
    """Embeddings of where two tokens are relative to each other: residue, token, entity and chain.

    Source: Abramson et al. 2024 (doi:10.1038/s41586-024-07487-w), Supplement, Algorithm 3.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.residue_bins, self.chain_bins = config.num_relative_residx_bins, config.num_relative_chain_bins
        self.sizes = (2 * self.residue_bins + 2, 2 * self.residue_bins + 2, 1, 2 * self.chain_bins + 2)
        self.embed = Linear(sum(self.sizes), config.pairwise_hidden_size, bias=False)

    def __call__(self, features: Mapping[str, mx.array]) -> mx.array:
        """Return the embeddings [B, L, L, C].

        The product of `embed` with one-hot features is a sum of its columns.

        Args:
            features: `residue_index`, `token_index`, `asym_id`, `sym_id` and `entity_id`, [B, L] each.
        """
        ends = [sum(self.sizes[:end]) for end in range(1, len(self.sizes))]
        residues, tokens, entity, chains = mx.split(self.embed.weight.T, ends)
        residue, token, asym, sym, entities = (
            features[name].astype(mx.int32)
            for name in ("residue_index", "token_index", "asym_id", "sym_id", "entity_id")
        )

        def step(
            residue_i: mx.array, token_i: mx.array, asym_i: mx.array, sym_i: mx.array, entity_i: mx.array
        ) -> mx.array:
            same_chain = asym_i[:, :, None] == asym[:, None]
            same_residue = same_chain & (residue_i[:, :, None] == residue[:, None])
            same_entity = entity_i[:, :, None] == entities[:, None]
            x = residues[offset_bins(residue_i, residue, self.residue_bins, same_chain)]
            x = x + tokens[offset_bins(token_i, token, self.residue_bins, same_residue)]
            x = x + chains[offset_bins(sym_i, sym, self.chain_bins, mx.logical_not(same_chain))]
            return x + same_entity[..., None] * entity[0]

        rows = rows_at_a_time(residue.size * self.embed.weight.shape[0])
        return by_rows(step, rows, residue, token, asym, sym, entities)


def offset_bins(index_i: mx.array, index_j: mx.array, bins: int, counts: mx.array) -> mx.array:
    """Return the bins [B, rows, L] of the offsets i − j, clipped to ±`bins`; pairs that do not count have the last bin.

    Args:
        index_i: [B, rows].
        index_j: [B, L].
        bins: largest offset with a bin of its own.
        counts: [B, rows, L], bool.
    """
    offsets = mx.clip(index_i[:, :, None] - index_j[:, None] + bins, 0, 2 * bins)
    return mx.where(counts, offsets, 2 * bins + 1)


class MLXEsmFold2InputEmbedder(Module):
    """States of tokens and pairs from the features of a protein."""

    def __init__(self, config: Any):
        super().__init__()
        C = config.pairwise_hidden_size
        self.num_res_types = config.num_res_types
        self.atom_encoder = MLXEsmFold2AtomEncoder(config, config.atom_encoder)
        self.pair_init_1 = Linear(config.single_inputs_size, C, bias=False)
        self.pair_init_2 = Linear(config.single_inputs_size, C, bias=False)
        self.rel_pos = MLXEsmFold2RelativePositionEncoding(config)
        self.token_bonds = Linear(1, C, bias=False)

    def single_inputs(self, features: Mapping[str, mx.array]) -> mx.array:
        """Return the states of the tokens [B, L, single_inputs_size].

        They are the means over each token's atoms, its one-hot residue type, the profile of the MSA and the mean number
        of deletions.
        """
        context = self.atom_encoder.context(features)
        embeds = context.embeds
        tokens, _ = self.atom_encoder(embeds, modulations_of(self.atom_encoder.layers, embeds), context)
        mask = features["attention_mask"][..., None].astype(mx.float32)
        types = one_hot(features["res_type"], self.num_res_types) * mask
        profile, deletions = types, features.get("deletion_mean")
        if features.get("msa") is not None:
            profile = self.profile(features["msa"], features.get("msa_attention_mask"))
        deletions = mx.zeros(types.shape[:2]) if deletions is None else deletions
        return mx.concatenate(
            [tokens, *(x.astype(tokens.dtype) for x in (types, profile, deletions[..., None]))], axis=-1
        )

    def profile(self, msa: mx.array, mask: mx.array | None) -> mx.array:
        """Return how often each residue type occurs in each column, [B, L, types], of an MSA [B, M, L]."""
        counts = mx.zeros((len(msa), msa.shape[2], self.num_res_types))
        valid = mx.ones(msa.shape) if mask is None else mask.astype(mx.float32)
        rows, columns = mx.arange(len(msa))[:, None, None], mx.arange(msa.shape[2])
        counts = counts.at[rows, columns, msa.astype(mx.int32)].add(valid)
        return counts / mx.maximum(valid.sum(axis=1), 1)[..., None]

    def bonds(self, features: Mapping[str, mx.array]) -> mx.array | None:
        """Return the embeddings [B, L, L, C] of covalent bonds; None if there are no bonds."""
        bonds = features.get("token_bonds")
        values = None if bonds is None else to_numpy(bonds)
        if bonds is None or (values is not None and not values.any()):
            return None
        return self.token_bonds(bonds.astype(self.token_bonds.weight.dtype))

    def initial_pair_states(self, single_inputs: mx.array, features: Mapping[str, mx.array]) -> mx.array:
        """Return the pair states [B, L, L, C] before the trunk, given the states of the tokens."""
        z = self.rel_pos(features).astype(single_inputs.dtype)
        evaluate(z)
        z = z + self.pair_init_1(single_inputs)[:, :, None] + self.pair_init_2(single_inputs)[:, None]
        bonds = self.bonds(features)
        return z if bonds is None else z + bonds.astype(z.dtype)


def one_hot(index: mx.array, size: int) -> mx.array:
    """Return one-hot vectors [..., size] of indices, in float32."""
    return (index[..., None] == mx.arange(size)).astype(mx.float32)
