"""The atom networks of ESMFold2: attention among neighbours in the list of atoms, from atoms to tokens and back.

The input embedder and the denoiser have an encoder each, and the denoiser has a decoder. What they compute from the
features alone, `AtomContext` and the modulations of the layers, is computed once per protein.

In shapes, B is the batch, A the atoms, L the tokens, C the width of an atom's state and N the batch times the diffusion
samples; arrays of the context with batch 1 serve all samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_esm_hf import ops
from mlx_esm_hf.modeling_layers import LayerNorm, Linear, Module
from mlx_esm_hf.models.esmfold2.layers import MLXEsmFold2SwiGLU, rms_norm

Rotary = tuple[mx.array, mx.array]


class AtomContext(NamedTuple):
    """What the atom layers read from the features.

    Attributes:
        embeds: [B, A, C], embeddings of the atoms.
        rotary: cosines and sines of the rotary angles, [B, A, head_dim / 2] each.
        mask: [B, A], bool, False at padding.
        atom_to_token: [B, A], index of each atom's token.
        num_tokens: L.
    """

    embeds: mx.array
    rotary: Rotary
    mask: mx.array
    atom_to_token: mx.array
    num_tokens: int


class MLXEsmFold2RotaryEmbedding(Module):
    """Rotary angles of the positions of atoms in the reference conformer and of the number of their group."""

    def __init__(self, atom_config: Any):
        super().__init__()
        axis, uid = atom_config.num_spatial_rope_pairs_per_axis, atom_config.num_uid_rope_pairs
        spatial = np.float32(atom_config.spatial_rope_base_frequency) ** -(
            np.arange(axis, dtype=np.float32) / max(axis, 1)
        )
        group = np.float32(atom_config.uid_rope_base_frequency) ** -(np.arange(uid, dtype=np.float32) / max(uid, 1))
        unused = np.zeros(atom_config.head_dim // 2 - 3 * axis - uid, dtype=np.float32)
        self.pairs_per_axis = axis
        self._frequencies = np.concatenate([np.tile(spatial, 3), group, unused]).astype(np.float32)

    def __call__(self, ref_pos: mx.array, ref_space_uid: mx.array) -> Rotary:
        """Return the cosines and sines [B, A, head_dim / 2], in float32.

        Args:
            ref_pos: [B, A, 3], in Å.
            ref_space_uid: [B, A].
        """
        positions = mx.repeat(ref_pos.astype(mx.float32), self.pairs_per_axis, axis=-1)
        rest = len(self._frequencies) - positions.shape[-1]
        groups = mx.repeat(ref_space_uid.astype(mx.float32)[..., None], rest, axis=-1)
        angles = mx.concatenate([positions, groups], axis=-1) * mx.array(self._frequencies)
        return mx.cos(angles), mx.sin(angles)


class MLXEsmFold2AtomAttention(Module):
    """Gated attention of each atom to the atoms at most half a window away in the list."""

    def __init__(self, config: Any, atom_config: Any):
        super().__init__()
        C = atom_config.hidden_size
        self.heads = atom_config.num_attention_heads
        self.half_window = config.sliding_window // 2
        self.q_proj = Linear(C, C, bias=False)
        self.k_proj = Linear(C, C, bias=False)
        self.v_proj = Linear(C, C, bias=False)
        self.o_proj = Linear(C, C, bias=False)
        self.gate_proj = Linear(C, C, bias=False)

    def __call__(self, x: mx.array, rotary: Rotary, mask: mx.array) -> mx.array:
        """Return the states [N, A, C].

        Args:
            x: [N, A, C].
            rotary: see `AtomContext`.
            mask: [B, A].
        """
        query, key = self.rotated(self.q_proj(x), rotary), self.rotated(self.k_proj(x), rotary)
        y = ops.windowed_attention(query, key, self.v_proj(x), self.heads, self.half_window, mask)
        return self.o_proj(ops.sigmoid_gate(y, self.gate_proj(x)))

    def rotated(self, x: mx.array, rotary: Rotary) -> mx.array:
        """Normalize each head of x [N, A, C], and rotate its channels c and c + head_dim / 2 by one angle."""
        cos, sin = (angle[:, :, None].astype(x.dtype) for angle in rotary)
        first, second = mx.split(rms_norm(mx.unflatten(x, -1, (self.heads, -1))), 2, axis=-1)
        return mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).flatten(-2)


class MLXEsmFold2AtomLayer(Module):
    """Attention and SwiGLU, each with a scale, a shift and a gate that the atom's embedding gives."""

    def __init__(self, config: Any, atom_config: Any):
        super().__init__()
        C = atom_config.hidden_size
        self.adaln_linear = Linear(C, 6 * C, bias=False)
        self.self_attn = MLXEsmFold2AtomAttention(config, atom_config)
        self.mlp = MLXEsmFold2SwiGLU(C, atom_config.intermediate_size)

    def modulation(self, embeds: mx.array) -> mx.array:
        """Return shift, scale and gate of attention and feed-forward, [B, A, 6 C], of embeddings [B, A, C]."""
        return self.adaln_linear(ops.sigmoid_gate(embeds, embeds))

    def __call__(self, h: mx.array, modulation: mx.array, rotary: Rotary, mask: mx.array) -> mx.array:
        """Return the states [N, A, C].

        Args:
            h: [N, A, C].
            modulation: [B, A, 6 C].
            rotary: see `AtomContext`.
            mask: [B, A].
        """
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = mx.split(modulation, 6, axis=-1)
        h = h + attn_gate * self.self_attn(rms_norm(h) * (1 + attn_scale) + attn_shift, rotary, mask)
        return h + mlp_gate * self.mlp(rms_norm(h) * (1 + mlp_scale) + mlp_shift)


def run_layers(
    layers: Sequence[MLXEsmFold2AtomLayer], h: mx.array, modulations: Sequence[mx.array], context: AtomContext
) -> mx.array:
    """Return the states [N, A, C] after all layers."""
    for layer, modulation in zip(layers, modulations, strict=True):
        h = layer(h, modulation, context.rotary, context.mask)
    return h


def modulations_of(layers: Sequence[MLXEsmFold2AtomLayer], embeds: mx.array) -> list[mx.array]:
    """Return the modulation [B, A, 6 C] of each layer."""
    return [layer.modulation(embeds) for layer in layers]


class MLXEsmFold2AtomEncoder(Module):
    """Embeds atoms, runs atom layers, and averages over the atoms of each token."""

    def __init__(self, config: Any, atom_config: Any):
        super().__init__()
        C = atom_config.hidden_size
        self.elements = config.max_atomic_number
        self.first_rows = tuple(config.char_vocab_size * place for place in range(config.max_chars))
        self.atom_linear = Linear(config.atom_feature_dim, C, bias=False)
        self.atom_norm = LayerNorm(C)
        self.rotary_emb = MLXEsmFold2RotaryEmbedding(atom_config)
        self.layers = [MLXEsmFold2AtomLayer(config, atom_config) for _ in range(atom_config.num_hidden_layers)]
        self.atom_to_token_linear = Linear(C, atom_config.output_dim, bias=False)

    def context(self, features: Mapping[str, mx.array]) -> AtomContext:
        """Return what the layers read from the features; see `features.protein_features`.

        The product of `atom_linear` with one-hot elements and characters is a sum of its columns.
        """
        mask = features["atom_attention_mask"].astype(mx.bool_)
        elements = features["ref_element"].astype(mx.int32)
        chars = features["ref_atom_name_chars"].astype(mx.int32) + mx.array(self.first_rows)
        continuous, of_element, of_char = mx.split(self.atom_linear.weight.T, [5, 5 + self.elements])
        embeds = (of_element[elements] + of_char[chars].sum(axis=2)) * mask[..., None]
        values = [features["ref_pos"], features["ref_charge"][..., None], mask[..., None]]
        embeds = embeds + mx.concatenate([x.astype(embeds.dtype) for x in values], axis=-1) @ continuous
        rotary = self.rotary_emb(features["ref_pos"], features["ref_space_uid"])
        atom_to_token = features["atom_to_token"].astype(mx.int32) * mask
        embeds = self.atom_norm(embeds.astype(ops.computing_dtype(embeds.dtype)))
        return AtomContext(embeds, rotary, mask, atom_to_token, features["attention_mask"].shape[1])

    def __call__(self, h: mx.array, modulations: Sequence[mx.array], context: AtomContext) -> tuple[mx.array, mx.array]:
        """Return the states of the tokens [N, L, output_dim] and of the atoms [N, A, C].

        Args:
            h: [N, A, C].
            modulations: result of `modulations_of`.
            context: see `AtomContext`.
        """
        h = run_layers(self.layers, h, modulations, context)
        return token_means(mx.maximum(self.atom_to_token_linear(h), 0), context), h


def token_means(x: mx.array, context: AtomContext) -> mx.array:
    """Return the mean [N, L, C] of the states [N, A, C] of each token's atoms; 0 for a token without atoms."""
    counts = token_sums(context.mask[..., None].astype(mx.float32), context)
    return token_sums(x * context.mask[..., None], context) / mx.maximum(counts, 1).astype(x.dtype)


def token_sums(x: mx.array, context: AtomContext) -> mx.array:
    """Return the sum [N, L, C] of x [N, A, C] over the atoms of each token."""
    rows = mx.arange(len(x))[:, None]
    sums = mx.zeros((len(x), context.num_tokens, x.shape[-1]), dtype=x.dtype)
    return sums.at[rows, mx.broadcast_to(context.atom_to_token, x.shape[:2])].add(x)


def at_atoms(x: mx.array, atom_to_token: mx.array) -> mx.array:
    """Return the states [N, A, C] of each atom's token, from states [N, L, C] of the tokens."""
    if len(atom_to_token) == 1:
        return mx.take(x, atom_to_token[0], axis=1)
    return mx.take_along_axis(x, atom_to_token[..., None], axis=1)


class MLXEsmFold2AtomDecoder(Module):
    """Adds the states of the tokens to those of the atoms, runs atom layers, and returns a shift of each atom."""

    def __init__(self, config: Any):
        super().__init__()
        diffusion = config.structure_head.diffusion_module
        C = diffusion.atom_encoder.hidden_size
        self.token_to_atom_linear = Linear(diffusion.hidden_size, C, bias=False)
        self.layers = [
            MLXEsmFold2AtomLayer(config, diffusion.atom_encoder)
            for _ in range(diffusion.atom_encoder.num_hidden_layers)
        ]
        self.norm = LayerNorm(C)
        self.output_linear = Linear(C, 3, bias=False)

    def __call__(
        self, tokens: mx.array, h: mx.array, modulations: Sequence[mx.array], context: AtomContext
    ) -> mx.array:
        """Return the shifts [N, A, 3].

        Args:
            tokens: [N, L, token width].
            h: [N, A, C], from the encoder.
            modulations: result of `modulations_of`.
            context: see `AtomContext`.
        """
        h = h + at_atoms(self.token_to_atom_linear(tokens), context.atom_to_token)
        return self.output_linear(self.norm(run_layers(self.layers, h, modulations, context)))
