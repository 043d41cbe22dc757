"""ESMFold in MLX: from a sequence to a structure (Lin et al. 2023; Science, doi:10.1126/science.ade2574).

Read from top to bottom it is the network: the operations on the state of residue pairs, the block of the trunk, the
trunk with its passes, confidence, and the model. Modules and parameters are named as in transformers'
`models/esm/modeling_esmfold.py`. The structure module has a file of its own.

In the shapes B is the batch, L the residues, H the heads, C the width of a pair's state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from transformers import PreTrainedConfig

from mlx_esm_hf import ops
from mlx_esm_hf.dtypes import as_dtype
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_inputs import as_array, to_numpy
from mlx_esm_hf.modeling_layers import Embedding, LayerNorm, Linear
from mlx_esm_hf.modeling_outputs import MLXEsmForProteinFoldingOutput
from mlx_esm_hf.models.esm.modeling_esm import MLXEsmModel, MLXEsmPreTrainedModel
from mlx_esm_hf.models.esm.names import TRANSFORMERS_4, TRANSFORMERS_5
from mlx_esm_hf.models.esmfold import residue_constants
from mlx_esm_hf.models.esmfold.structure_module import MLXEsmFoldStructureModule
from mlx_esm_hf.ops.pairs import Affine, by_rows, gated_linear, rows_at_a_time, transition, triangle_attention
from mlx_esm_hf.runtime.memory import evaluate

DISTOGRAM_BINS = 64
LDDT_BINS = 50
MAX_ALIGNED_ERROR = 31.0  # in Å, where the last bin begins
RECYCLE_BINS = 15
RECYCLE_RANGE = (3.375, 21.375)  # in Å, between CB atoms

# Residues, X, and two ids that no residue has: the trunk's own table of residues has rows for them.
NUM_AA_TOKENS = len(residue_constants.RESTYPES) + 3
UNKNOWN = residue_constants.RESTYPES_WITH_X.index("X")

CHANNELS_AT_A_TIME = 32  # whose edges are in memory together

# Operations on the state of residue pairs


def parameters_of(layer: Any) -> Affine:
    """The weight and bias of a linear layer or a layer norm."""
    return Affine(layer.weight, layer.get("bias"))


def triangle_product(a: mx.array, b: mx.array, outgoing: bool) -> mx.array:
    """Σ_k a_ik · b_jk of each channel, or Σ_k a_ki · b_kj of edges that come in; all are [C, B, L, L]."""
    return a @ b.swapaxes(-1, -2) if outgoing else a.swapaxes(-1, -2) @ b


class Dropout(nn.Module):
    """Dropout that leaves out the same for all places along an axis."""

    def __init__(self, p: float, axis: int):
        super().__init__()
        self.p, self.axis = p, axis

    def add(self, x: mx.array, update: Callable[[mx.array | None], mx.array]) -> mx.array:
        """x + dropout(update(None)). Where nothing is dropped it is update(x), which adds x to what it computes."""
        if not (self.training and self.p):
            return update(x)
        y = update(None)
        shape = [1 if axis == self.axis else n for axis, n in enumerate(y.shape)]
        return x + y * mx.random.bernoulli(1 - self.p, shape) / (1 - self.p)


class MLXEsmFoldTriangleMultiplicativeUpdate(nn.Module):
    """An edge (i, j) learns of the edges that i and j have to each third residue (Algorithms 11 and 12)."""

    def __init__(self, C: int, outgoing: bool):
        super().__init__()
        self.outgoing = outgoing
        self.linear_a_p, self.linear_a_g = Linear(C, C), Linear(C, C)
        self.linear_b_p, self.linear_b_g = Linear(C, C), Linear(C, C)
        self.linear_g, self.linear_z = Linear(C, C), Linear(C, C)
        self.layer_norm_in, self.layer_norm_out = LayerNorm(C), LayerNorm(C)

    def __call__(self, z: mx.array, mask: mx.array, residual: mx.array | None = None) -> mx.array:
        """z [B, L, L, C], mask [B, L] and perhaps a residual to [B, L, L, C]."""
        names = "layer_norm_in", "linear_a_g", "linear_a_p", "linear_b_g", "linear_b_p", "linear_g", "linear_z"
        norm, a_gate, a_layer, b_gate, b_layer, gate, layer = (parameters_of(self[name]) for name in names)
        pairs = (mask[:, :, None] * mask[:, None, :]).astype(z.dtype)

        def edges(gate: Affine, layer: Affine, channels: slice) -> mx.array:
            gate, layer = (Affine(w[channels], None if b is None else b[channels]) for w, b in (gate, layer))
            return gated_linear(z, norm, gate, layer, mask=pairs, channels_first=True)

        products = []
        for first in range(0, z.shape[-1], CHANNELS_AT_A_TIME):
            channels = slice(first, first + CHANNELS_AT_A_TIME)
            a, b = edges(a_gate, a_layer, channels), edges(b_gate, b_layer, channels)
            products.append(triangle_product(a, b, self.outgoing))
            del a, b
            evaluate(products[-1])
        x = mx.concatenate(products)
        del products
        evaluate(x)
        return gated_linear(z, norm, gate, layer, x, parameters_of(self.layer_norm_out), residual=residual)


class MLXEsmFoldAttention(nn.Module):
    """The layers of gated attention in rows of pairs."""

    def __init__(self, C: int):
        super().__init__()
        self.linear_q = Linear(C, C, bias=False)
        self.linear_k = Linear(C, C, bias=False)
        self.linear_v = Linear(C, C, bias=False)
        self.linear_o = Linear(C, C)
        self.linear_g = Linear(C, C)


class MLXEsmFoldTriangleAttention(nn.Module):
    """Attention among the edges that begin at one residue, or that end there (Algorithms 13 and 14)."""

    def __init__(self, C: int, head_width: int, starting: bool):
        super().__init__()
        self.starting = starting
        self.layer_norm = LayerNorm(C)
        self.linear = Linear(C, C // head_width, bias=False)
        self.mha = MLXEsmFoldAttention(C)

    def __call__(
        self, z: mx.array, mask: mx.array, residual: mx.array | None = None, chunk_size: int | None = None
    ) -> mx.array:
        """z [B, L, L, C], mask [B, L] and perhaps a residual to [B, L, L, C].

        Args:
            chunk_size: how many rows to compute at a time; None, as many as 16 MB hold. The CPU kernel needs none.
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


class MLXEsmFoldSelfAttention(nn.Module):
    """Gated attention of residues with a bias from the pairs."""

    def __init__(self, C: int, head_width: int):
        super().__init__()
        self.heads = C // head_width
        self.proj = Linear(C, 3 * C, bias=False)
        self.o_proj = Linear(C, C)
        self.g_proj = Linear(C, C)

    def __call__(self, x: mx.array, mask: mx.array, bias: mx.array, residual: mx.array | None = None) -> mx.array:
        """x [B, L, C], mask [B, L], bias [B, L, L, H] and perhaps a residual to [B, L, C]."""
        B, L, C = x.shape
        qkv = self.proj(x).reshape(B, L, self.heads, 3, -1)  # each head has its own three in a row
        query, key, value = (qkv[..., i, :].reshape(B, L, C) for i in range(3))
        layout = ops.Layout((B, L), mask.astype(mx.bool_))
        y = ops.attention(query, key, value, self.heads, layout, bias=bias.transpose(0, 3, 1, 2))
        return self.o_proj(y * mx.sigmoid(self.g_proj(x)), residual=residual)


class MLXEsmFoldSequenceToPair(nn.Module):
    """Products and differences of the states of two residues, [B, L, sequence] to [B, L, L, pairwise]."""

    def __init__(self, sequence_state_dim: int, pairwise_state_dim: int):
        super().__init__()
        inner = pairwise_state_dim // 2
        self.layernorm = LayerNorm(sequence_state_dim)
        self.proj = Linear(sequence_state_dim, 2 * inner)
        self.o_proj = Linear(2 * inner, pairwise_state_dim)

    def __call__(self, sequence_state: mx.array, residual: mx.array | None = None) -> mx.array:
        q, k = mx.split(self.proj(self.layernorm(sequence_state)), 2, axis=-1)
        product, difference = mx.split(self.o_proj.weight, 2, axis=1)
        # The differences are projected before they are taken: L of them, not L².
        plus, minus = ops.linear(q, difference, self.o_proj.bias), ops.linear(k, difference)

        def step(k: mx.array, minus: mx.array, residual: mx.array | None) -> mx.array:
            along = plus[:, None] - minus[:, :, None]
            along = along if residual is None else along + residual
            return ops.linear(q[:, None] * k[:, :, None], product, residual=along)

        return by_rows(step, rows_at_a_time(plus.size), k, minus, residual)


class MLXEsmFoldPairToSequence(nn.Module):
    """The bias of attention, [B, L, L, pairwise] to [B, L, L, H]."""

    def __init__(self, pairwise_state_dim: int, heads: int):
        super().__init__()
        self.layernorm = LayerNorm(pairwise_state_dim)
        self.linear = Linear(pairwise_state_dim, heads, bias=False)

    def __call__(self, pairwise_state: mx.array) -> mx.array:
        return self.linear(self.layernorm(pairwise_state))


class MLXEsmFoldResidueMLP(nn.Module):
    """Layer norm, two dense layers with ReLU between, and the residual."""

    def __init__(self, C: int, dropout: float):
        super().__init__()
        self.mlp: Any = [LayerNorm(C), Linear(C, 4 * C), nn.ReLU(), Linear(4 * C, C), Dropout(dropout, axis=-1)]

    def __call__(self, x: mx.array, rows: int | None = None) -> mx.array:
        norm, expand, _, shrink, drop = self.mlp
        layers = parameters_of(norm), parameters_of(expand), parameters_of(shrink)
        return drop.add(x, lambda residual: transition(x, *layers, residual, rows))


class MLXEsmFoldTriangularSelfAttentionBlock(nn.Module):
    """A block of the trunk: the states of residues, then those of their pairs, each with an eye on the other."""

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
        self.drop = Dropout(config.dropout, axis=-1)
        self.row_drop = Dropout(2 * config.dropout, axis=2)
        self.col_drop = Dropout(2 * config.dropout, axis=1)

    def __call__(
        self, s: mx.array, z: mx.array, mask: mx.array, chunk_size: int | None = None
    ) -> tuple[mx.array, mx.array]:
        """s [B, L, sequence_state_dim] and z [B, L, L, pairwise_state_dim], under mask [B, L], to the same."""
        bias = self.pair_to_sequence(z)
        attended = self.layernorm_1(s)
        s = self.drop.add(s, lambda residual: self.seq_attention(attended, mask, bias, residual))
        s = self.mlp_seq(s)
        z = self.sequence_to_pair(s, z)
        # Each is computed before the next one, so that the inside of one alone is in memory.
        evaluate(z)
        z = self.row_drop.add(z, lambda residual: self.tri_mul_out(z, mask, residual))
        evaluate(z)
        z = self.col_drop.add(z, lambda residual: self.tri_mul_in(z, mask, residual))
        evaluate(z)
        z = self.row_drop.add(z, lambda residual: self.tri_att_start(z, mask, residual, chunk_size))
        evaluate(z)
        z = self.col_drop.add(z, lambda residual: self.tri_att_end(z, mask, residual, chunk_size))
        evaluate(z)
        return s, self.mlp_pair(z, chunk_size)


# The trunk


class MLXEsmFoldRelativePosition(nn.Module):
    """Vectors for how far apart two residues are in the sequence: [B, L] to [B, L, L, pairwise_state_dim]."""

    def __init__(self, config: Any):
        super().__init__()
        self.bins = config.position_bins
        self.embedding = Embedding(2 * self.bins + 2, config.pairwise_state_dim)

    def __call__(self, residue_index: mx.array, mask: mx.array) -> mx.array:
        distance = mx.clip(residue_index[:, None, :] - residue_index[:, :, None], -self.bins, self.bins)
        pairs = mask[:, :, None] * mask[:, None, :]
        return self.embedding(mx.where(pairs == 0, 0, distance + self.bins + 1))  # row 0 is that of padding


def recycle_bins(positions: mx.array) -> mx.array:
    """The bin [B, L, L], 0 to 14, of the distance between the CB atoms of a backbone [B, L, 3 or more, 3]."""
    nitrogen, alpha, carbon = (positions[:, :, i] for i in range(3))
    b, c = alpha - nitrogen, carbon - alpha
    beta = -0.58273431 * mx.linalg.cross(b, c) + 0.56802827 * b - 0.54067466 * c + alpha
    differences = (beta[:, None, :, i] - beta[:, :, None, i] for i in range(3))
    squared = sum((d * d for d in differences), start=mx.array(0.0))
    bins = mx.zeros(squared.shape, dtype=mx.int32)
    for boundary in np.linspace(*RECYCLE_RANGE, RECYCLE_BINS - 1, dtype=np.float32) ** 2:
        bins = bins + (squared > mx.array(boundary))
    return bins


class MLXEsmFoldingTrunk(nn.Module):
    """The blocks and the structure module, run several times; each pass sees what the one before came to."""

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
        self.on_pass: Callable[[int, int], None] | None = None  # told which pass begins, from 1, and of how many

    def set_chunk_size(self, chunk_size: int | None) -> None:
        """How many rows of pairs triangle attention and the transition of pairs compute at a time.

        Args:
            chunk_size: None, by default and whatever the config says, is as many as take 16 MB: faster on a CPU than
                all at once, and a bound for the memory. The result is the same.
        """
        if chunk_size is not None and chunk_size < 1:
            raise UserError(f"chunk_size={chunk_size}: it must be 1 at least, or None.")
        self.chunk_size = chunk_size

    def passes(self, num_recycles: int | None) -> int:
        """How often the trunk runs: once more than it recycles; None, as often as the config's `max_recycles` says."""
        if num_recycles is None:
            num_recycles = self.config.max_recycles - 1
        if num_recycles < 0:
            raise UserError(f"num_recycles={num_recycles}: the trunk would never run. It must be 0 at least.")
        return num_recycles + 1

    def __call__(
        self, s: mx.array, aatype: mx.array, position_ids: mx.array, mask: mx.array, num_recycles: int | None = None
    ) -> dict[str, mx.array]:
        """
        Args:
            s: [B, L, sequence_state_dim], what the stem knows.
            aatype, position_ids, mask: [B, L].
            num_recycles: as in `passes`.

        Returns:
            `s_s`, `s_z` and what the structure module returns, of the last pass; gradients flow through that one alone.
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
        """One pass.

        Args:
            recycle_s, recycle_z, bins: the states [B, L, ...] and [B, L, L, ...] and the bins [B, L, L] of the pass
                before; zeros in the first one.
        """
        s = s + self.recycle_s_norm(recycle_s)
        z = self.recycle_z_norm(recycle_z) + self.recycle_disto(bins)
        evaluate(z)  # before the next sum, so that fewer are in memory
        z = z + self.pairwise_positional_embedding(position_ids, mask)
        evaluate(z)
        for block in self.blocks:
            s, z = block(s, z, mask, self.chunk_size)
            evaluate(z)
        structure = self.structure_module(self.trunk2sm_s(s), self.trunk2sm_z(z), aatype, mask)
        return {"s_s": s, "s_z": z, **structure}


# Confidence


def categorical_lddt(logits: mx.array) -> mx.array:
    """The expected lDDT [...], 0 to 1, of logits [..., 50] over bins between them."""
    centers = (np.arange(LDDT_BINS, dtype=np.float32) + 0.5) / LDDT_BINS
    return (ops.softmax(logits) * mx.array(centers)).sum(axis=-1)


def aligned_error_centers() -> mx.array:
    """The centres of the bins of the aligned error, in Å [64]."""
    step = MAX_ALIGNED_ERROR / (DISTOGRAM_BINS - 2)
    return mx.array((np.arange(DISTOGRAM_BINS) * step + step / 2).astype(np.float32))


def compute_tm(probabilities: mx.array, mask: mx.array) -> mx.array:
    """The predicted TM-score of each protein [B]: the best alignment's, over its own length (Jumper et al. 2021,
    Supplement 1.9.7).

    Args:
        probabilities: [B, L, L, 64], over bins of the aligned error.
        mask: [B, L], 0 for padding, which neither counts as length nor as an alignment.
    """
    mask = mask.astype(mx.float32)
    length = mask.sum(axis=-1)
    d0 = 1.24 * (mx.maximum(length, 19) - 15) ** (1 / 3) - 1.8
    terms = 1 / (1 + (aligned_error_centers() / d0[:, None]) ** 2)  # [B, 64]
    expected = (probabilities * terms[:, None, None]).sum(axis=-1)
    by_alignment = (expected * mask[:, None]).sum(axis=-1) / (length[:, None] + 1e-8)
    return mx.where(mask > 0, by_alignment, 0).max(axis=-1)


# The model


class MLXEsmForProteinFolding(MLXEsmPreTrainedModel):
    """ESMFold: an ESM-2 stem, the folding trunk, and a structure with its confidence.

    The stem is frozen. Under `esmfold_config.fp16_esm` its weights are float16 and stay so when they are saved. The
    trunk is float32 or bfloat16. Frames and atoms are always float32.

    Example:
        >>> model = MLXEsmForProteinFolding.from_pretrained("facebook/esmfold_v1")
        >>> output = model.infer("MLKNVQVQLV")
        >>> output.positions[-1].shape, output.mean_plddt
        >>> pdb = model.infer_pdb("MLKNVQVQLV:MKTAYIAKQR")  # two chains
    """

    dialects = (TRANSFORMERS_4, TRANSFORMERS_5)  # fair-esm's `lm_head` is another one
    buffers = (*MLXEsmPreTrainedModel.buffers, "af2_to_esm")
    required = (*MLXEsmPreTrainedModel.required, "trunk.", "esm_s_", "embedding.")
    quantized = ()
    folds = True

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        fold, trunk = self.config.esmfold_config, self.config.esmfold_config.trunk
        c_s, c_z = trunk.sequence_state_dim, trunk.pairwise_state_dim
        self.esm = MLXEsmModel(stem_config(self.config), add_pooling_layer=False)
        if fold.fp16_esm:
            self.esm.set_dtype(mx.float16)
        self.esm.freeze()
        vocabulary = list(self.config.vocab_list)
        self.af2_to_esm = mx.array(
            [vocabulary.index(token) for token in ("<pad>", *residue_constants.RESTYPES_WITH_X)], dtype=mx.int64
        )
        self.esm_s_combine = mx.zeros(self.config.num_hidden_layers + 1)
        self.esm_s_mlp: Any = [
            LayerNorm(self.config.hidden_size),
            Linear(self.config.hidden_size, c_s),
            nn.ReLU(),
            Linear(c_s, c_s),
        ]
        if fold.embed_aa:
            self.embedding = Embedding(NUM_AA_TOKENS, c_s)
        self.trunk = MLXEsmFoldingTrunk(trunk)
        self.distogram_head = Linear(c_z, DISTOGRAM_BINS)
        self.ptm_head = Linear(c_z, DISTOGRAM_BINS)
        self.lm_head = Linear(c_s, NUM_AA_TOKENS)
        width, hidden = trunk.structure_module.sequence_dim, fold.lddt_head_hid_dim
        self.lddt_head: Any = [
            LayerNorm(width),
            Linear(width, hidden),
            Linear(hidden, hidden),
            Linear(hidden, len(residue_constants.ATOM37) * LDDT_BINS),
        ]

    @property
    def _no_grad(self) -> set[str]:
        """Frozen for good, as whole numbers have no gradient."""
        return {"af2_to_esm"}

    @_no_grad.setter
    def _no_grad(self, names: set[str]) -> None:
        pass

    @property
    def dtype(self) -> mx.Dtype:
        """That of the trunk; the stem has its own."""
        return self.esm_s_combine.dtype

    def set_chunk_size(self, chunk_size: int | None) -> None:
        """As the trunk's."""
        self.trunk.set_chunk_size(chunk_size)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        masking_pattern: Any = None,
        num_recycles: int | None = None,
        return_dict: bool | None = None,
    ) -> MLXEsmForProteinFoldingOutput | tuple:
        """
        Args:
            input_ids: [B, L], residues in AlphaFold's order ("ARNDCQEGHILKMFPSTWYV", 20 for X), not ESM's tokens: the
                tokenizer of the published checkpoint with `add_special_tokens=False`. Padding has any of these ids.
            attention_mask: [B, L], 1 for residues, 0 for padding, which stands on the right.
            position_ids: [B, L], [1, L] or [L], whole numbers; by default residues are counted from 0. Only the
                differences matter, up to the config's `position_bins`.
            masking_pattern: [B, L], 1 for residues that the stem does not see; another pattern gives another
                structure. The trunk and the structure know them. (As in fair-esm; transformers fails on it.)
            num_recycles: the trunk runs once more than this; by default the config's `max_recycles` times in all.

        Each protein's `ptm` is its own. transformers returns one for the batch, into which padding enters; the two
        agree for a single protein.

        Raises:
            ValueError: ids that are no residues, padding on the left or between residues, an empty protein, arguments
                of other shapes.
        """
        aatype, mask, positions = check_folding_inputs(input_ids, attention_mask, position_ids)
        hidden = self.compute_language_model_representations(aatype, mask, as_array(masking_pattern))
        norm, first, _, last = self.esm_s_mlp
        s = last(first(norm(hidden), activation="relu"))
        if "embedding" in self:
            s = s + self.embedding(aatype)
        structure = self.trunk(s, aatype, positions, mask, num_recycles)
        output = MLXEsmForProteinFoldingOutput(
            **structure, **self.heads(structure, mask), **atoms(aatype, mask), aatype=aatype, residue_index=positions
        )
        output.mean_plddt = mean_plddt(output.plddt, output.atom37_atom_exists)
        return output if self.returns_dict(return_dict) else output.to_tuple()

    def heads(self, structure: dict[str, mx.array], mask: mx.array) -> dict[str, mx.array]:
        """What is said of a structure: distances, residues and confidence."""
        s, z, states = structure["s_s"], structure["s_z"], structure["states"]
        distogram = self.distogram_head(z)
        lddt = states
        for layer in self.lddt_head:
            lddt = layer(lddt)
        lddt = lddt.reshape(*states.shape[:-1], -1, LDDT_BINS)
        ptm_logits = self.ptm_head(z)
        probabilities = ops.softmax(ptm_logits.astype(mx.float32))
        centers = aligned_error_centers()
        return {
            "distogram_logits": (distogram + distogram.swapaxes(1, 2)) / 2,
            "lm_logits": self.lm_head(s),
            "lddt_head": lddt,
            "plddt": categorical_lddt(lddt[-1]),
            "ptm_logits": ptm_logits,
            "ptm": compute_tm(probabilities, mask),
            "aligned_confidence_probs": probabilities,
            "predicted_aligned_error": (probabilities * centers).sum(axis=-1),
            "max_predicted_aligned_error": centers[-1],
        }

    # The stem

    def compute_language_model_representations(
        self, aatype: mx.array, mask: mx.array, masking_pattern: mx.array | None = None
    ) -> mx.array:
        """The stem's states, its layers mixed by `esm_s_combine`: [B, L, hidden_size] in the dtype of the trunk."""
        fold = self.config.esmfold_config
        if fold.bypass_lm or fold.esm_ablate_sequence:
            return mx.zeros((*aatype.shape, self.config.hidden_size), dtype=self.dtype)
        tokens, token_mask = self.tokens(aatype, mask, masking_pattern)
        hidden_states, layout, positions = self.esm.embed(tokens, token_mask)
        weights = mx.softmax(self.esm_s_combine)
        mixed = weights[0] * mx.stop_gradient(hidden_states).astype(self.dtype)
        last_norm = self.esm.encoder.emb_layer_norm_after
        for i, layer in enumerate(self.esm.encoder.layer, start=1):
            hidden_states, _ = layer(hidden_states, layout, positions)
            state = last_norm(hidden_states) if i == self.config.num_hidden_layers else hidden_states
            mixed = mixed + weights[i] * mx.stop_gradient(state).astype(self.dtype)
            evaluate(mixed)
        return layout.unpack(mixed)[:, 1:-1]

    def tokens(
        self, aatype: mx.array, mask: mx.array, masking_pattern: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """The tokens that the stem sees, [B, L + 2] with <cls> and <eos>, and their mask."""
        vocabulary = list(self.config.vocab_list)
        cls, pad, eos, masked = (vocabulary.index(token) for token in ("<cls>", "<pad>", "<eos>", "<mask>"))
        tokens = self.af2_to_esm[mx.where(mask == 1, aatype + 1, 0)].astype(mx.int32)
        if masking_pattern is not None:
            if masking_pattern.shape != aatype.shape:
                raise UserError(f"masking_pattern has the shape {masking_pattern.shape}, input_ids {aatype.shape}.")
            tokens = mx.where((masking_pattern == 1) & (mask == 1), masked, tokens)
        B = len(tokens)
        tokens = mx.concatenate([mx.full((B, 1), cls), tokens, mx.full((B, 1), pad)], axis=1)
        end = mask.sum(axis=1, keepdims=True) + 1
        tokens = mx.where(mx.arange(tokens.shape[1]) == end, eos, tokens)
        return tokens, mx.arange(tokens.shape[1]) <= end

    # From sequences to files

    def infer(
        self,
        sequences: str | list[str],
        residx: Any = None,
        masking_pattern: Any = None,
        num_recycles: int | None = None,
        residue_index_offset: int | None = 512,
        chain_linker: str | None = "G" * 25,
    ) -> MLXEsmForProteinFoldingOutput:
        """Fold proteins.

        Args:
            sequences: one, or several as a batch, in capital letters; letters that are no amino acid of the twenty are
                folded as X, which has no atoms. ":" stands between the chains of a protein: they are folded as one
                sequence with linkers between them.
            residx: [B, L], positions instead of those that follow from the sequences; L is that of the longest
                sequence with its linkers. `residue_index_offset` then does nothing.
            masking_pattern, num_recycles: as in the call.
            residue_index_offset: what the positions of a chain jump by, besides its linker.
            chain_linker: residues between two chains.

        Returns:
            The output of the call, with `chain_index`; linkers have no atoms in its `atom37_atom_exists`.

        Raises:
            ValueError: an empty sequence or chain, or characters that are no capital letters.

        Source: fair-esm's `ESMFold.infer`.
        """
        sequences = [sequences] if isinstance(sequences, str) else list(sequences)
        if not sequences:
            raise UserError("There are no sequences to fold.")
        proteins = [encode_sequence(sequence, residue_index_offset, chain_linker) for sequence in sequences]
        aatype, positions, chains, linkers = (
            pad_rows([protein[i] for protein in proteins], filler) for i, filler in enumerate((0, 0, -1, 0))
        )
        output: Any = self(
            aatype,
            (chains >= 0).astype(mx.int32),
            positions if residx is None else residx,
            masking_pattern,
            num_recycles,
            return_dict=True,
        )
        output.chain_index = chains
        output.atom37_atom_exists = output.atom37_atom_exists * (1 - linkers)[..., None]
        output.mean_plddt = mean_plddt(output.plddt, output.atom37_atom_exists)
        return output

    @staticmethod
    def output_to_pdb(output: Any) -> list[str]:
        """The PDB file of each protein: chains from A, residues of each numbered from 1, pLDDT 0 to 100 as B factor
        (transformers writes 0 to 1, and residues by their positions)."""
        arrays = {name: np.array(output[name]) for name in ("aatype", "plddt", "atom37_atom_exists", "residue_index")}
        positions = np.array(atom14_to_atom37(output.positions[-1], output))
        chains = np.zeros_like(arrays["aatype"]) if output.chain_index is None else np.array(output.chain_index)
        return [
            pdb_of(
                arrays["aatype"][i], positions[i], arrays["atom37_atom_exists"][i], chains[i], 100 * arrays["plddt"][i]
            )
            for i in range(len(positions))
        ]

    def infer_pdb(self, sequence: str, *args: Any, **kwargs: Any) -> str:
        """The PDB file of a protein; the arguments are those of `infer`."""
        if not isinstance(sequence, str):
            raise UserError("infer_pdb folds one sequence; infer_pdbs takes a list.")
        return self.infer_pdbs([sequence], *args, **kwargs)[0]

    def infer_pdbs(self, sequences: list[str], *args: Any, **kwargs: Any) -> list[str]:
        """The PDB file of each protein; the arguments are those of `infer`."""
        return self.output_to_pdb(self.infer(sequences, *args, **kwargs))

    # Loading

    def loaded_dtype(self, name: str, dtype: mx.Dtype) -> mx.Dtype:
        """The stem stays float16 under `fp16_esm`.

        Raises:
            ValueError: a float16 trunk.
        """
        if name.startswith("esm.") and self.config.esmfold_config.fp16_esm:
            return mx.float16
        refuse_float16(dtype)
        return dtype

    def to(self, *args: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
        """As in every model; stem and trunk are cast alike.

        Raises:
            ValueError: float16, which the trunk overflows.
        """
        for wanted in (*args, dtype):
            refuse_float16(as_dtype(wanted))
        return super().to(*args, dtype=dtype, device=device, **kwargs)


def refuse_float16(dtype: mx.Dtype | None) -> None:
    """
    Raises:
        ValueError: it is float16.
    """
    if dtype == mx.float16:
        raise UserError(
            "The folding trunk cannot be float16: the sums of its triangle multiplications overflow, and most proteins "
            "become NaN. Take float32 or bfloat16; the ESM-2 stem stays in float16 under esmfold_config.fp16_esm."
        )


def stem_config(config: PreTrainedConfig) -> Any:
    """The config of the language model in a folding model."""
    config = copy.deepcopy(config)
    config.is_folding_model = False
    config.esmfold_config = None
    return config


def check_folding_inputs(input_ids: Any, attention_mask: Any, position_ids: Any) -> tuple[mx.array, mx.array, mx.array]:
    """The arguments of the call as int32 [B, L] each.

    Raises:
        ValueError: as the call says.
    """
    aatype = as_array(input_ids)
    if aatype.ndim != 2 or 0 in aatype.shape or not mx.issubdtype(aatype.dtype, mx.integer):
        raise UserError(f"input_ids must be whole numbers [B, L]; they have the shape {aatype.shape}, {aatype.dtype}.")
    ids = to_numpy(aatype)
    if ids is not None and (ids.min() < 0 or ids.max() > UNKNOWN):
        wrong = ids[(ids < 0) | (ids > UNKNOWN)][0]
        raise UserError(
            f"input_ids has {wrong}: folding takes residues, 0 to 20 for {residue_constants.RESTYPES_WITH_X}. Tokenize "
            "with add_special_tokens=False, by the tokenizer of the folding checkpoint."
        )
    mask = mx.ones(aatype.shape, dtype=mx.int32) if attention_mask is None else as_array(attention_mask)
    if mask.shape != aatype.shape:
        raise UserError(f"attention_mask has the shape {mask.shape}, input_ids {aatype.shape}.")
    mask = mask.astype(mx.int32)
    values = to_numpy(mask)
    if values is not None:
        if not np.isin(values, (0, 1)).all():
            raise UserError("attention_mask must be 1 for residues and 0 for padding.")
        if (values[:, 0] == 0).any() or (np.diff(values, axis=1) > 0).any():
            raise UserError(
                "Each protein must begin at the first place of its row, with padding behind it: the stem's <eos> would "
                "take the place of a residue. Pad on the right (padding_side='right')."
            )
    if position_ids is None:
        positions = mx.arange(aatype.shape[1])
    else:
        positions = as_array(position_ids)
        if not mx.issubdtype(positions.dtype, mx.integer):
            raise UserError(f"position_ids must be whole numbers, not {positions.dtype}.")
    try:
        positions = mx.broadcast_to(positions.astype(mx.int32), aatype.shape)
    except ValueError as error:
        raise UserError(f"position_ids has the shape {positions.shape}, input_ids {aatype.shape}.") from error
    return aatype.astype(mx.int32), mask, positions


def encode_sequence(
    sequence: str, residue_index_offset: int | None, chain_linker: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The residues, positions, chains and linkers (1 where there is one) of a protein with its linkers, [L] each."""
    chains, linker, offset = sequence.split(":"), chain_linker or "", residue_index_offset or 0
    for chain in chains:
        if not (chain.isascii() and chain.isalpha() and chain.isupper()):
            name = f"{sequence[:40]}..." if len(sequence) > 40 else sequence
            raise UserError(
                f"{name!r} cannot be folded: a protein is written in capital letters, A to Z, with ':' between chains, "
                "none of which may be empty."
            )
    order = {letter: i for i, letter in enumerate(residue_constants.RESTYPES)}
    aatype = np.array([order.get(letter, UNKNOWN) for letter in linker.join(chains)], dtype=np.int32)
    lengths = [len(chain) for chain in chains]
    chain_index = np.repeat(np.arange(len(chains)), [n + len(linker) for n in lengths])[: len(aatype)].astype(np.int32)
    linkers = np.concatenate([np.repeat([0, 1], [n, len(linker)]) for n in lengths])[: len(aatype)].astype(np.int32)
    return aatype, np.arange(len(aatype), dtype=np.int32) + chain_index * offset, chain_index, linkers


def pad_rows(rows: list[np.ndarray], filler: int) -> mx.array:
    """Rows of different lengths as one array, filled up on the right."""
    length = max(len(row) for row in rows)
    return mx.array(np.stack([np.pad(row, (0, length - len(row)), constant_values=filler) for row in rows]))


def atoms(aatype: mx.array, mask: mx.array) -> dict[str, mx.array]:
    """Which atoms each residue [B, L] has, by either order of them; none at padding."""
    exists = mask[..., None].astype(mx.float32)
    return {
        "atom14_atom_exists": mx.array(residue_constants.ATOM14_MASK)[aatype] * exists,
        "atom37_atom_exists": mx.array(residue_constants.ATOM37_MASK)[aatype] * exists,
        "residx_atom14_to_atom37": mx.array(residue_constants.ATOM14_TO_ATOM37)[aatype],
        "residx_atom37_to_atom14": mx.array(residue_constants.ATOM37_TO_ATOM14)[aatype],
    }


def atom14_to_atom37(atom14: mx.array, output: Any) -> mx.array:
    """Positions [B, L, 37, 3] from [B, L, 14, 3], zeros where there is no atom."""
    places = output.residx_atom37_to_atom14
    return mx.take_along_axis(atom14, places[..., None], axis=2) * output.atom37_atom_exists[..., None]


def mean_plddt(plddt: mx.array | None, exists: mx.array | None) -> mx.array:
    """The mean over the atoms of each protein [B]; 0 for one without atoms."""
    assert plddt is not None and exists is not None
    return (plddt * exists).sum(axis=(1, 2)) / mx.maximum(exists.sum(axis=(1, 2)), 1)


def pdb_of(
    aatype: np.ndarray, positions: np.ndarray, exists: np.ndarray, chain_index: np.ndarray, plddt: np.ndarray
) -> str:
    """A PDB file.

    Args:
        aatype, chain_index: [L].
        positions: [L, 37, 3].
        exists, plddt: [L, 37].
    """
    lines, serial = [], 1
    for chain in range(chain_index.max() + 1):
        residues = np.flatnonzero(chain_index == chain)
        name = ""
        for number, residue in enumerate(residues, start=1):
            for atom in np.flatnonzero(exists[residue]):
                label, (x, y, z) = residue_constants.ATOM37[atom], positions[residue, atom]
                name = f"{residue_constants.RESIDUE_NAMES[aatype[residue]]} {chr(ord('A') + chain)}{number:4d}"
                lines.append(
                    f"ATOM  {serial:5d}  {label:<3s} {name}    {x:8.3f}{y:8.3f}{z:8.3f}"
                    f"{1:6.2f}{plddt[residue, atom]:6.2f}          {label[0]:>2s}  "
                )
                serial += 1
        lines.append(f"TER   {serial:5d}      {name}".ljust(80))
        serial += 1
    return "\n".join([*lines, "END".ljust(80)]) + "\n"
