"""Layers that several parts of ESMFold2 share.

Layer norms have the eps 1e-5, and RMS norms have no weight. In shapes, C is the width of a state.
"""

from __future__ import annotations

import math

import mlx.core as mx

from mlx_esm_hf import ops
from mlx_esm_hf.modeling_layers import FrozenBuffers, LayerNorm, Linear, Module, parameters_of
from mlx_esm_hf.ops.pairs import transition

RMS_EPS = 1e-6


def rms_norm(x: mx.array) -> mx.array:
    """Return x [..., C] divided by its root mean square over the last axis, without a weight."""
    return mx.fast.rms_norm(x, None, RMS_EPS)


class MLXEsmFold2SwiGLU(Module):
    """SwiGLU feed-forward without biases (Shazeer 2020; arXiv:2002.05202): [..., C] to [..., C]."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, hidden_states: mx.array) -> mx.array:
        """Return down(silu(gate) · up)."""
        gate, up = mx.split(self.gate_up_proj(hidden_states), 2, axis=-1)
        return self.down_proj(ops.swiglu(gate, up))


class MLXEsmFold2Transition(Module):
    """Layer norm, SwiGLU and the residual: [B, L, ..., C] to the same shape."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.norm = LayerNorm(hidden_size)
        self.mlp = MLXEsmFold2SwiGLU(hidden_size, intermediate_size)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the updated states."""
        expand, shrink = parameters_of(self.mlp.gate_up_proj), parameters_of(self.mlp.down_proj)
        return transition(x, parameters_of(self.norm), expand, shrink, residual=x, gated=True)


class MLXEsmFold2AdaptiveLayerNorm(Module):
    """Layer norm whose scale and shift depend on other states (Peebles and Xie 2023; arXiv:2212.09748)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.cond_norm = LayerNorm(hidden_size, bias=False)
        self.gate_proj = Linear(hidden_size, hidden_size)
        self.shift_proj = Linear(hidden_size, hidden_size, bias=False)

    def modulation(self, single_states: mx.array) -> tuple[mx.array, mx.array]:
        """Return the scale and the shift [..., C] that conditioning states [..., C] give."""
        normed = self.cond_norm(single_states)
        return ops.sigmoid(self.gate_proj(normed)), self.shift_proj(normed)

    def __call__(self, hidden_states: mx.array, modulation: tuple[mx.array, mx.array]) -> mx.array:
        """Return the normalized states [..., C].

        Args:
            hidden_states: [..., C].
            modulation: result of `modulation`; it can be shared by several samples.
        """
        scale, shift = modulation
        unit = mx.ones(hidden_states.shape[-1], dtype=mx.float32)
        return ops.layer_norm(hidden_states, unit, None, self.cond_norm.eps) * scale + shift


class MLXEsmFold2FourierEmbedding(FrozenBuffers):
    """Embedding of a noise level by cosines of stored random frequencies and phases."""

    frozen = ("frequencies", "phases")

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.frequencies = mx.random.normal((embedding_dim,))
        self.phases = mx.random.normal((embedding_dim,))

    def __call__(self, noise_level: mx.array) -> mx.array:
        """Return cos(2π(level · frequencies + phases)), [N] to [N, embedding_dim], in float32."""
        turns = noise_level.astype(mx.float32)[:, None] * self.frequencies + self.phases
        return mx.cos(2 * math.pi * turns)
