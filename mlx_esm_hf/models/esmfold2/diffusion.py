"""The denoiser of ESMFold2: from noisy atom positions to denoised ones, given the states of the trunk.

From top to bottom: attention of tokens, their layers, conditioning, and the module. What does not depend on the noise
is computed once per protein (`Conditioning`), and what depends on the noise level alone once per step. The samples of a
protein share both.

In shapes, B is the batch, S the diffusion samples of a protein, N = B · S (S varies fastest), A the atoms, L the
tokens, D the width of a token's state, C that of a pair's state and H the heads.

Source: Abramson et al. 2024 (doi:10.1038/s41586-024-07487-w), Supplement, Algorithms 20 to 24. The scaling of inputs
and outputs is that of Karras et al. 2022 (arXiv:2206.00364).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_esm_hf import ops
from mlx_esm_hf.modeling_layers import LayerNorm, Linear, Module
from mlx_esm_hf.models.esmfold2.atoms import AtomContext, MLXEsmFold2AtomDecoder, MLXEsmFold2AtomEncoder, modulations_of
from mlx_esm_hf.models.esmfold2.layers import (
    MLXEsmFold2AdaptiveLayerNorm,
    MLXEsmFold2FourierEmbedding,
    MLXEsmFold2SwiGLU,
    MLXEsmFold2Transition,
)
from mlx_esm_hf.ops.pairs import EPS, by_rows, rows_at_a_time
from mlx_esm_hf.runtime.memory import evaluate


class Conditioning(NamedTuple):
    """What every step of the sampler reads.

    Attributes:
        atoms: see `AtomContext`.
        encoder: modulations [B, A, 6 · atom width] of the encoder's layers.
        decoder: modulations of the decoder's layers.
        singles: [B, L, D], states of the tokens without noise level.
        biases: [B, H, L, L], attention bias of each token layer.
    """

    atoms: AtomContext
    encoder: list[mx.array]
    decoder: list[mx.array]
    singles: mx.array
    biases: list[mx.array]


class MLXEsmFold2DiffusionAttention(Module):
    """Gated attention of tokens with a bias for each pair, [N, L, D] to the same shape."""

    def __init__(self, config: Any, diffusion_config: Any):
        super().__init__()
        D = diffusion_config.hidden_size
        self.heads = diffusion_config.num_attention_heads
        self.q_proj = Linear(D, D)
        self.k_proj = Linear(D, D, bias=False)
        self.v_proj = Linear(D, D, bias=False)
        self.gate_proj = Linear(D, D, bias=False)
        self.o_proj = Linear(D, D, bias=False)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        """Return the states.

        Args:
            x: [N, L, D].
            bias: [B, H, L, L], added to the scores.
        """
        if 1 < len(bias) < len(x):
            bias = mx.repeat(bias, len(x) // len(bias), axis=0)
        y = ops.attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, bias=bias.astype(x.dtype))
        return self.o_proj(ops.sigmoid_gate(y, self.gate_proj(x)))


class LayerModulation(NamedTuple):
    """What a token layer computes from the conditioning states alone, for all samples: [B, L, D] each, or pairs."""

    attn_norm: tuple[mx.array, mx.array]
    attn_gate: mx.array
    mlp_norm: tuple[mx.array, mx.array]
    mlp_gate: mx.array


class MLXEsmFold2DiffusionLayer(Module):
    """Attention and SwiGLU with adaptive norms and gates, [N, L, D] to the same shape."""

    def __init__(self, config: Any):
        super().__init__()
        diffusion = config.structure_head.diffusion_module
        D, C = diffusion.hidden_size, config.pairwise_hidden_size
        self.input_layernorm = MLXEsmFold2AdaptiveLayerNorm(D)
        self.self_attn = MLXEsmFold2DiffusionAttention(config, diffusion)
        self.attn_gate = Linear(D, D)
        self.post_attention_layernorm = MLXEsmFold2AdaptiveLayerNorm(D)
        self.mlp = MLXEsmFold2SwiGLU(D, diffusion.intermediate_size)
        self.mlp_gate = Linear(D, D)
        self.pair_norm = LayerNorm(C)
        self.pair_bias_proj = Linear(C, diffusion.num_attention_heads, bias=False)

    def modulation(self, single_states: mx.array) -> LayerModulation:
        """Return what depends on the conditioning states [B, L, D] alone."""
        return LayerModulation(
            self.input_layernorm.modulation(single_states),
            ops.sigmoid(self.attn_gate(single_states)),
            self.post_attention_layernorm.modulation(single_states),
            ops.sigmoid(self.mlp_gate(single_states)),
        )

    def __call__(self, x: mx.array, modulation: LayerModulation, bias: mx.array) -> mx.array:
        """Return the states.

        Args:
            x: [N, L, D].
            modulation: result of `modulation`, whose batch must be 1 or N.
            bias: [B, H, L, L].
        """
        x = x + modulation.attn_gate * self.self_attn(self.input_layernorm(x, modulation.attn_norm), bias)
        return x + modulation.mlp_gate * self.mlp(self.post_attention_layernorm(x, modulation.mlp_norm))


class MLXEsmFold2DiffusionTransformer(Module):
    """The layers of the tokens."""

    def __init__(self, config: Any):
        super().__init__()
        layers = config.structure_head.diffusion_module.num_hidden_layers
        self.layers = [MLXEsmFold2DiffusionLayer(config) for _ in range(layers)]

    def pair_biases(self, pair_states: mx.array) -> mx.array:
        """Return the attention biases of all layers [B, rows, L, layers · H] from pair states [B, rows, L, C].

        All layers normalize the same states, so the weights of the norms go into one projection.
        """
        weights, biases = [], []
        for layer in self.layers:
            projection = layer.pair_bias_proj.weight.astype(mx.float32)
            weights.append(projection * layer.pair_norm.weight)
            biases.append(projection @ layer.pair_norm.bias)
        unit = mx.ones(pair_states.shape[-1], dtype=mx.float32)
        normed = ops.layer_norm(pair_states, unit, None, EPS)
        dtype = pair_states.dtype
        return ops.linear(normed, mx.concatenate(weights).astype(dtype), mx.concatenate(biases).astype(dtype))

    def __call__(self, x: mx.array, single_states: mx.array, biases: list[mx.array]) -> mx.array:
        """Return the states [N, L, D].

        Args:
            x: [N, L, D].
            single_states: [1 or N, L, D], the conditioning.
            biases: [B, H, L, L] for each layer.
        """
        for layer, bias in zip(self.layers, biases, strict=True):
            x = layer(x, layer.modulation(single_states), bias)
        return x


class MLXEsmFold2DiffusionConditioning(Module):
    """Conditioning of the denoiser: states of pairs, and states of tokens with the noise level."""

    def __init__(self, config: Any):
        super().__init__()
        diffusion = config.structure_head.diffusion_module
        C, D = config.pairwise_hidden_size, diffusion.hidden_size
        self.sigma_data = diffusion.sigma_data
        self.pair_input_norm = LayerNorm(2 * C)
        self.pair_proj = Linear(2 * C, C, bias=False)
        self.pair_transition_0 = MLXEsmFold2Transition(C, diffusion.pair_intermediate_size)
        self.pair_transition_1 = MLXEsmFold2Transition(C, diffusion.pair_intermediate_size)
        self.single_input_norm = LayerNorm(config.single_inputs_size)
        self.single_proj = Linear(config.single_inputs_size, D, bias=False)
        self.fourier = MLXEsmFold2FourierEmbedding(diffusion.fourier_dim)
        self.noise_norm = LayerNorm(diffusion.fourier_dim)
        self.noise_proj = Linear(diffusion.fourier_dim, D, bias=False)
        self.single_transition_0 = MLXEsmFold2Transition(D, diffusion.intermediate_size)
        self.single_transition_1 = MLXEsmFold2Transition(D, diffusion.intermediate_size)

    def pair_states(self, z: mx.array, relative: mx.array) -> mx.array:
        """Return the conditioning of pairs [B, rows, L, C].

        Args:
            z: [B, rows, L, C], from the trunk.
            relative: [B, rows, L, C], relative positions.
        """
        states = mx.concatenate([z, relative.astype(z.dtype)], axis=-1)
        dtype = ops.computing_dtype(self.pair_proj.weight.dtype)
        states = self.pair_proj(self.pair_input_norm(states).astype(dtype))
        return self.pair_transition_1(self.pair_transition_0(states))

    def single_states(self, single_inputs: mx.array) -> mx.array:
        """Return the states of the tokens [B, L, D] without noise level, from [B, L, single_inputs_size]."""
        return self.single_proj(self.single_input_norm(single_inputs))

    def __call__(self, noise_level: mx.array, single_states: mx.array) -> mx.array:
        """Return the states of the tokens with noise levels.

        Args:
            noise_level: [N], in Å.
            single_states: [N or 1, L, D].
        """
        scaled = 0.25 * mx.log(mx.maximum(noise_level / self.sigma_data, 1e-20))
        noise = self.noise_proj(self.noise_norm(self.fourier(scaled)).astype(single_states.dtype))
        states = single_states + noise[:, None]
        return self.single_transition_1(self.single_transition_0(states))


class MLXEsmFold2DiffusionModule(Module):
    """The denoiser."""

    def __init__(self, config: Any):
        super().__init__()
        diffusion = config.structure_head.diffusion_module
        D = diffusion.hidden_size
        self.sigma_data = diffusion.sigma_data
        self.heads = diffusion.num_attention_heads
        self.conditioning = MLXEsmFold2DiffusionConditioning(config)
        self.coords_linear = Linear(6, diffusion.atom_encoder.hidden_size, bias=False)
        self.atom_encoder = MLXEsmFold2AtomEncoder(config, diffusion.atom_encoder)
        self.atom_decoder = MLXEsmFold2AtomDecoder(config)
        self.single_to_token = Linear(D, D, bias=False)
        self.token_transformer = MLXEsmFold2DiffusionTransformer(config)
        self.single_step_norm = LayerNorm(D)
        self.token_norm = LayerNorm(D)

    def prepare(
        self, z: mx.array, relative: mx.array, single_inputs: mx.array, features: Mapping[str, mx.array]
    ) -> Conditioning:
        """Return what every step reads.

        Args:
            z: [B, L, L, C], pair states of the trunk, in float32.
            relative: [B, L, L, C], relative positions.
            single_inputs: [B, L, single_inputs_size].
            features: the atoms' features, and `attention_mask`.
        """
        atoms = self.atom_encoder.context(features)
        rows = rows_at_a_time(z[:, :1].size)
        biases = by_rows(
            lambda z, relative: self.token_transformer.pair_biases(self.conditioning.pair_states(z, relative)),
            rows,
            z,
            relative,
        )
        hidden = mx.where(features["attention_mask"].astype(mx.bool_), 0, mx.finfo(biases.dtype).min)
        biases = mx.contiguous(mx.unflatten(biases, -1, (-1, self.heads)).transpose(3, 0, 4, 1, 2))
        biases = biases + hidden[:, None, None]
        evaluate(biases)
        encoder = modulations_of(self.atom_encoder.layers, atoms.embeds)
        decoder = modulations_of(self.atom_decoder.layers, atoms.embeds)
        singles = self.conditioning.single_states(single_inputs)
        return Conditioning(atoms, encoder, decoder, singles, list(biases))

    def __call__(self, x: mx.array, noise_level: mx.array, conditioning: Conditioning) -> mx.array:
        """Return denoised positions [N, A, 3] in Å, in float32.

        Args:
            x: [N, A, 3], noisy positions in Å.
            noise_level: [1] for all samples, or [N], in Å.
            conditioning: result of `prepare`; with a batch above 1, its batch is N.
        """
        sigma, atoms = self.sigma_data, conditioning.atoms
        t = noise_level.astype(mx.float32)[:, None, None]
        singles = self.conditioning(noise_level, conditioning.singles)
        scaled = (x / mx.sqrt(t**2 + sigma**2)).astype(atoms.embeds.dtype)
        h = atoms.embeds + scaled @ self.coords_linear.weight[:, :3].T  # the other three inputs are always 0
        tokens, h = self.atom_encoder(h, conditioning.encoder, atoms)
        tokens = tokens + self.single_to_token(self.single_step_norm(singles))
        tokens = self.token_norm(self.token_transformer(tokens, singles, conditioning.biases))
        shifts = self.atom_decoder(tokens, h, conditioning.decoder, atoms).astype(mx.float32)
        total = sigma**2 + t**2
        return sigma**2 / total * x + sigma * t / mx.sqrt(total) * shifts
