"""The folding trunk of ESMFold: states of residues and of residue pairs, updated by blocks and repeated passes.

From top to bottom: triangle updates and triangle attention of pairs, attention of residues, the block, and the trunk.
Algorithm numbers are those of AlphaFold 2's Supplement (Jumper et al. 2021; doi:10.1038/s41586-021-03819-2).

MLX is lazy and would compute many steps together, with all their intermediates in memory. `evaluate` computes a step
before the next one is added to the graph, so memory holds the intermediates of one step only.

In shapes, B is the batch, L the residues, H the heads and C the width of a pair's state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_esm_hf import ops
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_layers import Embedding, LayerNorm, Linear, Module, parameters_of
from mlx_esm_hf.models.esmfold.structure_module import MLXEsmFoldStructureModule
from mlx_esm_hf.ops.pairs import by_rows, rows_at_a_time, transition, triangle_attention, triangle_multiplication
from mlx_esm_hf.runtime.memory import evaluate

RECYCLE_BINS = 15
RECYCLE_RANGE = (3.375, 21.375)  # in Å, between CB atoms

# Layers of the pair states


class SharedDropout(Module):
    """Dropout with one mask for all positions along an axis."""

    def __init__(self, p: float, axis: int):
        super().__init__()
        self.p, self.axis = p, axis

    def add_update(self, x: mx.array, layer: Callable[..., mx.array], *inputs: Any) -> mx.array:
        """Return x + dropout(layer(*inputs)).

        Without dropout, the layer adds x itself (as its `residual`), which needs no second array of the size of x.
        """
        if not (self.training and self.p):
            return layer(*inputs, residual=x)
        y = layer(*inputs)
        shape = [1 if axis == self.axis else n for axis, n in enumerate(y.shape)]
        return x + y * mx.random.bernoulli(1 - self.p, shape) / (1 - self.p)


class MLXEsmFoldTriangleMultiplicativeUpdate(Module):
    """Update of each edge (i, j) from the edges of i and j to every third residue k (Algorithms 11 and 12)."""

    def __init__(self, C: int, outgoing: bool):
        super().__init__()
        self.outgoing = outgoing
        self.linear_a_p, self.linear_a_g = Linear(C, C), Linear(C, C)
        self.linear_b_p, self.linear_b_g = Linear(C, C), Linear(C, C)
        self.linear_g, self.linear_z = Linear(C, C), Linear(C, C)
        self.layer_norm_in, self.layer_norm_out = LayerNorm(C), LayerNorm(C)

    def __call__(self, z: mx.array, mask: mx.array, residual: mx.array | None = None) -> mx.array:
        """Return the update [B, L, L, C] of pair states, plus the residual.

        Args:
            z: [B, L, L, C].
            mask: [B, L].
            residual: [B, L, L, C].
        """
        return triangle_multiplication(
            z,
            mask,
            parameters_of(self.layer_norm_in),
            (parameters_of(self.linear_a_g), parameters_of(self.linear_a_p)),
            (parameters_of(self.linear_b_g), parameters_of(self.linear_b_p)),
            parameters_of(self.layer_norm_out),
            (parameters_of(self.linear_g), parameters_of(self.linear_z)),
            self.outgoing,
            residual,
        )


class MLXEsmFoldAttention(Module):
    """Layers of gated attention in rows of pairs."""

    def __init__(self, C: int):
        super().__init__()
        self.linear_q = Linear(C, C, bias=False)
        self.linear_k = Linear(C, C, bias=False)
        self.linear_v = Linear(C, C, bias=False)
        self.linear_o = Linear(C, C)
        self.linear_g = Linear(C, C)


class MLXEsmFoldTriangleAttention(Module):
    """Attention among the edges that start at the same residue, or end there (Algorithms 13 and 14)."""

    def __init__(self, C: int, head_width: int, starting: bool):
        super().__init__()
        self.starting = starting
        self.layer_norm = LayerNorm(C)
        self.linear = Linear(C, C // head_width, bias=False)
        self.mha = MLXEsmFoldAttention(C)

    def __call__(
        self, z: mx.array, mask: mx.array, chunk_size: int | None = None, residual: mx.array | None = None
    ) -> mx.array:
        """Return the update [B, L, L, C] of pair states, plus the residual.

        Args:
            z: [B, L, L, C].
            mask: [B, L].
            chunk_size: rows to compute at a time; None for as many as fit in 16 MB. The CPU kernel ignores it.
            residual: [B, L, L, C].
        """
        mha = self.mha
        return triangle_attention(
            z,
            mask.astype(z.dtype),
            parameters_of(self.layer_norm),
            self.linear.weight,
            mha.linear_q.weight,
            mha.linear_k.weight,
            mha.linear_v.weight,
            parameters_of(mha.linear_g),
            parameters_of(mha.linear_o),
            residual,
            not self.starting,
            chunk_size,
        )


# The block


class MLXEsmFoldSelfAttention(Module):
    """Gated attention of residues with a bias from the pair states."""

    def __init__(self, C: int, head_width: int):
        super().__init__()
        self.heads = C // head_width
        self.proj = Linear(C, 3 * C, bias=False)
        self.o_proj = Linear(C, C)
        self.g_proj = Linear(C, C)

    def __call__(self, x: mx.array, mask: mx.array, bias: mx.array, residual: mx.array | None = None) -> mx.array:
        """Return the update [B, L, C] of residue states, plus the residual.

        Args:
            x: [B, L, C].
            mask: [B, L].
            bias: [B, L, L, H].
            residual: [B, L, C].
        """
        B, L, C = x.shape
        qkv = self.proj(x).reshape(B, L, self.heads, 3, -1)  # query, key and value of a head are adjacent
        query, key, value = (qkv[..., i, :].reshape(B, L, C) for i in range(3))
        layout = ops.Layout((B, L), mask.astype(mx.bool_))
        y = ops.attention(query, key, value, self.heads, layout, bias=bias.transpose(0, 3, 1, 2))
        return self.o_proj(y * mx.sigmoid(self.g_proj(x)), residual=residual)


class MLXEsmFoldSequenceToPair(Module):
    """Products and differences of the states of two residues: [B, L, sequence] to [B, L, L, pairwise]."""

    def __init__(self, sequence_state_dim: int, pairwise_state_dim: int):
        super().__init__()
        inner = pairwise_state_dim // 2
        self.layernorm = LayerNorm(sequence_state_dim)
        self.proj = Linear(sequence_state_dim, 2 * inner)
        self.o_proj = Linear(2 * inner, pairwise_state_dim)

    def __call__(self, sequence_state: mx.array, residual: mx.array | None = None) -> mx.array:
        """Return the update of pair states, plus the residual."""
        q, k = mx.split(self.proj(self.layernorm(sequence_state)), 2, axis=-1)
        product, difference = mx.split(self.o_proj.weight, 2, axis=1)
        # Project q and k before taking differences: 2 L projections instead of L².
        plus, minus = ops.linear(q, difference, self.o_proj.bias), ops.linear(k, difference)

        def step(k: mx.array, minus: mx.array, residual: mx.array | None) -> mx.array:
            along = plus[:, None] - minus[:, :, None]
            along = along if residual is None else along + residual
            return ops.linear(q[:, None] * k[:, :, None], product, residual=along)

        return by_rows(step, rows_at_a_time(plus.size), k, minus, residual)


class MLXEsmFoldPairToSequence(Module):
    """Attention bias from the pair states: [B, L, L, pairwise] to [B, L, L, H]."""

    def __init__(self, pairwise_state_dim: int, heads: int):
        super().__init__()
        self.layernorm = LayerNorm(pairwise_state_dim)
        self.linear = Linear(pairwise_state_dim, heads, bias=False)

    def __call__(self, pairwise_state: mx.array) -> mx.array:
        """Return the attention bias."""
        return self.linear(self.layernorm(pairwise_state))


class MLXEsmFoldResidueMLP(Module):
    """Layer norm, dense, ReLU, dense, and the residual: [B, L, ..., C] to the same shape."""

    def __init__(self, C: int, dropout: float):
        super().__init__()
        self.mlp: Any = [LayerNorm(C), Linear(C, 4 * C), nn.ReLU(), Linear(4 * C, C), SharedDropout(dropout, axis=-1)]

    def __call__(self, x: mx.array, rows: int | None = None) -> mx.array:
        """Return the updated states, computed `rows` rows at a time."""
        dropout = self.mlp[-1]
        return dropout.add_update(x, self.update_of, x, rows)

    def update_of(self, x: mx.array, rows: int | None, residual: mx.array | None = None) -> mx.array:
        """Return the update of x, plus the residual, computed `rows` rows at a time."""
        norm, expand, _, shrink, _ = self.mlp
        return transition(x, parameters_of(norm), parameters_of(expand), parameters_of(shrink), residual, rows)


class MLXEsmFoldTriangularSelfAttentionBlock(Module):
    """A block of the trunk: updates residue states using pair states, then pair states using residue states."""

    def __init__(self, config: Any):
        super().__init__()
        c_s, c_z = config.sequence_state_dim, config.pairwise_state_dim
        self.layernorm_1 = LayerNorm(c_s)
        self.sequence_to_pair = MLXEsmFoldSequenceToPair(c_s, c_z)
        self.pair_to_sequence = MLXEsmFoldPairToSequence(c_z, c_s // config.sequence_head_width)
        self.seq_attention = MLXEsmFoldSelfAttention(c_s, config.sequence_head_width)
        self.tri_mul_out = MLXEsmFoldTriangleMultiplicativeUpdate(c_z, outgoing=True)
        self.tri_mul_in = MLXEsmFoldTriangleMultiplicativeUpdate(c_z, outgoing=False)
        self.tri_att_start = MLXEsmFoldTriangleAttention(c_z, config.pairwise_head_width, starting=True)
        self.tri_att_end = MLXEsmFoldTriangleAttention(c_z, config.pairwise_head_width, starting=False)
        self.mlp_seq = MLXEsmFoldResidueMLP(c_s, config.dropout)
        self.mlp_pair = MLXEsmFoldResidueMLP(c_z, config.dropout)
        self.drop = SharedDropout(config.dropout, axis=-1)
        self.row_drop = SharedDropout(2 * config.dropout, axis=2)
        self.col_drop = SharedDropout(2 * config.dropout, axis=1)

    def __call__(
        self, s: mx.array, z: mx.array, mask: mx.array, chunk_size: int | None = None
    ) -> tuple[mx.array, mx.array]:
        """Return the updated states of residues and pairs.

        Args:
            s: [B, L, sequence_state_dim].
            z: [B, L, L, pairwise_state_dim].
            mask: [B, L].
            chunk_size: see `MLXEsmFoldingTrunk.set_chunk_size`.
        """
        s = self.drop.add_update(s, self.seq_attention, self.layernorm_1(s), mask, self.pair_to_sequence(z))
        s = self.mlp_seq(s)
        z = self.sequence_to_pair(s, z)
        evaluate(z)
        z = self.row_drop.add_update(z, self.tri_mul_out, z, mask)
        evaluate(z)
        z = self.col_drop.add_update(z, self.tri_mul_in, z, mask)
        evaluate(z)
        z = self.row_drop.add_update(z, self.tri_att_start, z, mask, chunk_size)
        evaluate(z)
        z = self.col_drop.add_update(z, self.tri_att_end, z, mask, chunk_size)
        evaluate(z)
        return s, self.mlp_pair(z, chunk_size)


# The trunk


class MLXEsmFoldRelativePosition(Module):
    """Embeddings of the distance of two residues in the sequence: [B, L] to [B, L, L, pairwise_state_dim]."""

    def __init__(self, config: Any):
        super().__init__()
        self.bins = config.position_bins
        self.embedding = Embedding(2 * self.bins + 2, config.pairwise_state_dim)

    def __call__(self, residue_index: mx.array, mask: mx.array) -> mx.array:
        """Return the embeddings for positions and a mask, [B, L] each."""
        distance = mx.clip(residue_index[:, None, :] - residue_index[:, :, None], -self.bins, self.bins)
        pairs = mask[:, :, None] * mask[:, None, :]
        return self.embedding(mx.where(pairs == 0, 0, distance + self.bins + 1))  # row 0 is for padding


def recycle_bins(positions: mx.array) -> mx.array:
    """Return the bins [B, L, L], 0 to 14, of the distances between the CB atoms of residues.

    Args:
        positions: [B, L, 3 or more, 3], backbone atoms N, CA and C first, in Å.
    """
    nitrogen, alpha, carbon = (positions[:, :, i] for i in range(3))
    b, c = alpha - nitrogen, carbon - alpha
    beta = -0.58273431 * mx.linalg.cross(b, c) + 0.56802827 * b - 0.54067466 * c + alpha
    differences = (beta[:, None, :, i] - beta[:, :, None, i] for i in range(3))
    squared = sum((d * d for d in differences), start=mx.array(0.0))
    bins = mx.zeros(squared.shape, dtype=mx.int32)
    for boundary in np.linspace(*RECYCLE_RANGE, RECYCLE_BINS - 1, dtype=np.float32) ** 2:
        bins = bins + (squared > mx.array(boundary))
    return bins


class MLXEsmFoldingTrunk(Module):
    """Blocks and structure module, run in several passes; each pass starts from the results of the previous one."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        c_s, c_z, structure = config.sequence_state_dim, config.pairwise_state_dim, config.structure_module
        self.pairwise_positional_embedding = MLXEsmFoldRelativePosition(config)
        self.blocks = [MLXEsmFoldTriangularSelfAttentionBlock(config) for _ in range(config.num_blocks)]
        self.recycle_s_norm = LayerNorm(c_s)
        self.recycle_z_norm = LayerNorm(c_z)
        self.recycle_disto = Embedding(RECYCLE_BINS, c_z)
        self.structure_module = MLXEsmFoldStructureModule(structure)
        self.trunk2sm_s = Linear(c_s, structure.sequence_dim)
        self.trunk2sm_z = Linear(c_z, structure.pairwise_dim)
        self.chunk_size: int | None = None
        self.on_pass: Callable[[int, int], None] | None = None  # called with (pass, passes) before each pass, from 1

    def set_chunk_size(self, chunk_size: int | None) -> None:
        """Set how many rows of pairs triangle attention and the transition of pairs compute at a time.

        Args:
            chunk_size: None, the default whatever the config says, computes as many rows as fit in 16 MB. This bounds
                the memory and is faster on a CPU than all rows at once. The result is the same.

        Raises:
            ValueError: `chunk_size` is below 1.
        """
        if chunk_size is not None and chunk_size < 1:
            raise UserError(f"chunk_size must be at least 1, or None, got {chunk_size}.")
        self.chunk_size = chunk_size

    def passes(self, num_recycles: int | None) -> int:
        """Return the number of passes, `num_recycles` + 1.

        Args:
            num_recycles: None for `max_recycles` passes in total, from the config.

        Raises:
            ValueError: `num_recycles` is negative.
        """
        if num_recycles is None:
            num_recycles = self.config.max_recycles - 1
        if num_recycles < 0:
            raise UserError(f"num_recycles must be at least 0, got {num_recycles}.")
        return num_recycles + 1

    def __call__(
        self, s: mx.array, aatype: mx.array, position_ids: mx.array, mask: mx.array, num_recycles: int | None = None
    ) -> dict[str, mx.array]:
        """Run all passes.

        Args:
            s: [B, L, sequence_state_dim], from the stem.
            aatype: [B, L].
            position_ids: [B, L].
            mask: [B, L].
            num_recycles: see `passes`.

        Returns:
            `s_s`, `s_z` and the results of the structure module from the last pass. Gradients flow through the last
            pass only.
        """
        B, L, _ = s.shape
        recycle_s = mx.zeros_like(s)
        recycle_z = mx.broadcast_to(mx.zeros(1, dtype=s.dtype), (B, L, L, self.config.pairwise_state_dim))
        bins = mx.zeros((B, L, L), dtype=mx.int32)
        structure: dict[str, mx.array] = {}
        passes = self.passes(num_recycles)
        for number in range(1, passes + 1):
            if self.on_pass is not None:
                self.on_pass(number, passes)
            structure = self.run(s, recycle_s, recycle_z, bins, aatype, position_ids, mask)
            recycle_s, recycle_z = mx.stop_gradient(structure["s_s"]), mx.stop_gradient(structure["s_z"])
            bins = mx.stop_gradient(recycle_bins(structure["positions"][-1]))
            evaluate(bins)
        return structure

    def run(
        self,
        s: mx.array,
        recycle_s: mx.array,
        recycle_z: mx.array,
        bins: mx.array,
        aatype: mx.array,
        position_ids: mx.array,
        mask: mx.array,
    ) -> dict[str, mx.array]:
        """Run one pass.

        Args:
            s: [B, L, sequence_state_dim], from the stem.
            recycle_s: [B, L, sequence_state_dim], residue states of the previous pass; zeros in the first.
            recycle_z: [B, L, L, pairwise_state_dim], pair states of the previous pass; zeros in the first.
            bins: [B, L, L], distance bins of the previous pass; zeros in the first.
            aatype: [B, L].
            position_ids: [B, L].
            mask: [B, L].

        Returns:
            `s_s`, `s_z` and the results of the structure module.
        """
        s = s + self.recycle_s_norm(recycle_s)
        z = self.recycle_z_norm(recycle_z) + self.recycle_disto(bins)
        evaluate(z)
        z = z + self.pairwise_positional_embedding(position_ids, mask)
        evaluate(z)
        for block in self.blocks:
            s, z = block(s, z, mask, self.chunk_size)
            evaluate(z)
        structure = self.structure_module(self.trunk2sm_s(s), self.trunk2sm_z(z), aatype, mask)
        return {"s_s": s, "s_z": z, **structure}
