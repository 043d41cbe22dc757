"""The MSA encoder of ESMFold2: an alignment updates the pair states, and these update the alignment.

In shapes, B is the batch, L the tokens, M the rows of the alignment, D the width of its states, C that of a pair's
state and H the heads.

Source: Abramson et al. 2024 (doi:10.1038/s41586-024-07487-w), Supplement, Algorithms 8 to 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_esm_hf import ops
from mlx_esm_hf.modeling_layers import LayerNorm, Linear, Module
from mlx_esm_hf.models.esmfold2.layers import MLXEsmFold2Transition
from mlx_esm_hf.models.esmfold2.trunk import MLXEsmFold2PairUpdateLayer, one_hot
from mlx_esm_hf.ops.pairs import by_rows, rows_at_a_time
from mlx_esm_hf.runtime.memory import evaluate


class MLXEsmFold2OuterProductMean(Module):
    """Mean over the rows of the outer products of two columns: [B, L, M, D] to [B, L, L, C]."""

    def __init__(self, config: Any):
        super().__init__()
        msa = config.msa_encoder
        self.width = msa.outer_hidden_size
        self.norm = LayerNorm(msa.hidden_size)
        self.input_proj = Linear(msa.hidden_size, 2 * self.width, bias=False)
        self.output_proj = Linear(self.width**2, config.pairwise_hidden_size)

    def __call__(self, m: mx.array, mask: mx.array, residual: mx.array) -> mx.array:
        """Return the update of pair states, plus the residual.

        Args:
            m: [B, L, M, D].
            mask: [B, L, M], 0 for elements that do not count.
            residual: [B, L, L, C].
        """
        left, right = mx.split(self.input_proj(self.norm(m)) * mask[..., None].astype(m.dtype), 2, axis=-1)
        counts = mask.astype(mx.float32)
        B, L, M, width = left.shape
        C = residual.shape[-1]
        # weight[a, b, c] is for left channel a and right channel b.
        weight = self.output_proj.weight.T.reshape(width, width, C)

        def few_rows(left: mx.array, counts_i: mx.array, residual: mx.array) -> mx.array:
            # Σ over rows m and channels b of (Σ_a left_ima weight_abc) right_jmb: for few rows this is less work than
            # the outer products.
            projected = (left.reshape(-1, width) @ weight.reshape(width, -1)).reshape(B, -1, M * width, C)
            return scaled(right.reshape(B, 1, L, M * width) @ projected, counts_i, residual)

        def many_rows(left: mx.array, counts_i: mx.array, residual: mx.array) -> mx.array:
            rows = left.shape[1]
            flat = left.transpose(0, 1, 3, 2).reshape(B, rows * width, M)
            outer = flat @ right.transpose(0, 2, 1, 3).reshape(B, M, L * width)
            outer = outer.reshape(B, rows, width, L, width).swapaxes(2, 3).reshape(B, rows, L, width**2)
            return scaled(ops.linear(outer, self.output_proj.weight), counts_i, residual)

        def scaled(y: mx.array, counts_i: mx.array, residual: mx.array) -> mx.array:
            pairs = mx.maximum(counts_i @ counts.swapaxes(1, 2), 1)[..., None].astype(y.dtype)
            return residual + (y + self.output_proj.bias) / pairs  # the bias is divided as well

        step, elements = (few_rows, M * width * C) if width >= M else (many_rows, L * width**2)
        return by_rows(step, rows_at_a_time(B * elements), left, counts, residual)


class MLXEsmFold2MSAPairWeightedAveraging(Module):
    """Means over the columns of an alignment, weighted by the pair states: [B, L, M, D] to the same shape."""

    def __init__(self, config: Any):
        super().__init__()
        msa = config.msa_encoder
        inner = msa.num_attention_heads * msa.head_dim
        self.heads = msa.num_attention_heads
        self.norm_single = LayerNorm(msa.hidden_size)
        self.bias_norm = LayerNorm(config.pairwise_hidden_size)
        self.bias_proj = Linear(config.pairwise_hidden_size, self.heads, bias=False)
        self.v_proj = Linear(msa.hidden_size, inner, bias=False)
        self.gate_proj = Linear(msa.hidden_size, inner, bias=False)
        self.o_proj = Linear(inner, msa.hidden_size, bias=False)

    def __call__(self, m: mx.array, z: mx.array, mask: mx.array) -> mx.array:
        """Return the updated states of the alignment.

        Args:
            m: [B, L, M, D].
            z: [B, L, L, C].
            mask: [B, L], False for columns that do not count.
        """
        scores = by_rows(lambda z: self.bias_proj(self.bias_norm(z)), rows_at_a_time(z[:, :1].size), z)
        pairs = mask[:, :, None] & mask[:, None]
        scores = mx.where(pairs[..., None], scores, mx.finfo(scores.dtype).min).transpose(0, 3, 1, 2)
        weights = ops.softmax(scores)  # [B, H, L, L]
        normed = self.norm_single(m)
        B, L, M, _ = m.shape
        values = self.v_proj(normed).reshape(B, L, M, self.heads, -1).transpose(0, 3, 1, 2, 4).flatten(3)
        means = (weights @ values).reshape(B, self.heads, L, M, -1).transpose(0, 2, 3, 1, 4).flatten(3)
        return self.o_proj(ops.sigmoid_gate(means, self.gate_proj(normed)), residual=m)


class MLXEsmFold2MSAEncoderLayer(MLXEsmFold2PairUpdateLayer):
    """Update of the pair states by the alignment, of the alignment by the pair states, and a pair layer.

    The last layer of a stack has no update of the alignment.
    """

    def __init__(self, config: Any, updates_msa: bool = True):
        super().__init__(config)
        self.updates_msa = updates_msa
        self.outer_product_mean = MLXEsmFold2OuterProductMean(config)
        if updates_msa:
            msa = config.msa_encoder
            self.msa_pair_weighted_averaging = MLXEsmFold2MSAPairWeightedAveraging(config)
            self.msa_transition = MLXEsmFold2Transition(msa.hidden_size, msa.intermediate_size)

    def run(self, m: mx.array, z: mx.array, msa_mask: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
        """Return the updated states of the alignment [B, L, M, D] and of pairs [B, L, L, C].

        Args:
            m: [B, L, M, D].
            z: [B, L, L, C].
            msa_mask: [B, L, M].
            mask: [B, L].
        """
        z = self.outer_product_mean(m, msa_mask, z)
        evaluate(z)
        if self.updates_msa:
            m = self.msa_transition(self.msa_pair_weighted_averaging(m, z, mask))
            evaluate(m)
        return m, self(z, mask)


class MLXEsmFold2MSAEncoder(Module):
    """Layers that update pair states by an alignment."""

    def __init__(self, config: Any):
        super().__init__()
        msa = config.msa_encoder
        self.num_res_types = config.num_res_types
        self.embed = Linear(config.num_res_types + 2, msa.hidden_size, bias=False)
        self.project_inputs = Linear(config.single_inputs_size, msa.hidden_size, bias=False)
        last = msa.num_hidden_layers - 1
        self.layers = [MLXEsmFold2MSAEncoderLayer(config, number != last) for number in range(last + 1)]

    def __call__(self, z: mx.array, single_inputs: mx.array, features: Mapping[str, mx.array]) -> mx.array:
        """Return the updated pair states [B, L, L, C].

        Columns that row 0 of the alignment masks take no part in the updates of pairs.

        Args:
            z: [B, L, L, C].
            single_inputs: [B, L, single_inputs_size].
            features: `msa` [B, M, L] and optionally `msa_attention_mask`, `has_deletion` and `deletion_value` of the
                same shape, and `attention_mask` [B, L].
        """
        msa = features["msa"].swapaxes(1, 2)
        mask = features.get("msa_attention_mask")
        if mask is None:
            mask = mx.broadcast_to(features["attention_mask"][:, None], features["msa"].shape)
        mask = mask.swapaxes(1, 2).astype(mx.float32)
        deletions = [features.get(name) for name in ("has_deletion", "deletion_value")]
        columns = [mx.zeros(msa.shape) if x is None else x.swapaxes(1, 2).astype(mx.float32) for x in deletions]
        inputs = [one_hot(msa, self.num_res_types) * mask[..., None], *(x[..., None] for x in columns)]
        m = self.embed(mx.concatenate(inputs, axis=-1).astype(z.dtype)) + self.project_inputs(single_inputs)[:, :, None]
        first = mask[:, :, 0] > 0
        for layer in self.layers:
            m, z = layer.run(m, z, mask, first)
        return z
