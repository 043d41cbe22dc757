"""From the hidden states of ESMC to pair states: a mean over its layers, then products and differences of residues.

In shapes, B is the batch, L the tokens, T the tokens of the language model, D its width and C that of a pair's state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_esm_hf import ops
from mlx_esm_hf.modeling_layers import LayerNorm, Linear, Module
from mlx_esm_hf.models.esmc.modeling_esmc import MLXEsmcModel
from mlx_esm_hf.ops.pairs import by_rows, rows_at_a_time
from mlx_esm_hf.runtime.memory import evaluate

PROTEIN = 0  # the molecule type


class StemInputs(NamedTuple):
    """Rows of the language model: `<cls>` chain `<eos>`, repeated for each chain.

    Attributes:
        input_ids: [B, T].
        sequence_id: [B, T], the chain of each token, −1 at padding.
        place: [B, L], index of each token's residue in the row; −1 if it is no residue of a protein.
    """

    input_ids: np.ndarray
    sequence_id: np.ndarray
    place: np.ndarray


def stem_inputs(
    config: Any,
    input_ids: np.ndarray,
    asym_id: np.ndarray,
    residue_index: np.ndarray,
    mol_type: np.ndarray,
    attention_mask: np.ndarray,
) -> StemInputs:
    """Return the rows of the language model for a batch of tokens, [B, L] each.

    Chains are in the order of `asym_id`. Tokens with the same chain and residue index, the atoms of a modified residue,
    share the first one's token of the language model.

    Args:
        config: config of the language model.
        input_ids: ids in its vocabulary.
        asym_id: chains.
        residue_index: residues in their chain.
        mol_type: 0 for proteins.
        attention_mask: 0 at padding.
    """
    rows, chains, places = [], [], []
    for ids, asym, residue, kind, mask in zip(input_ids, asym_id, residue_index, mol_type, attention_mask, strict=True):
        row: list[int] = []
        chain: list[int] = []
        place = np.full(len(ids), -1, dtype=np.int32)
        real = np.flatnonzero((kind == PROTEIN) & mask.astype(bool))
        for number, name in enumerate(np.unique(asym[real])):
            tokens = real[asym[real] == name]
            _, first, group = np.unique(residue[tokens], return_index=True, return_inverse=True)
            order = np.argsort(first)  # residues as they occur
            rank = np.argsort(order)
            place[tokens] = len(row) + 1 + rank[group.reshape(-1)]
            row += [config.bos_token_id, *ids[tokens[first[order]]].tolist(), config.eos_token_id]
            chain += [number] * (len(first) + 2)
        if not row:  # no protein: the language model needs a token
            row, chain = [config.bos_token_id, config.eos_token_id], [0, 0]
        rows.append(row)
        chains.append(chain)
        places.append(place)
    T = max(map(len, rows))
    padded = np.array([row + [config.pad_token_id] * (T - len(row)) for row in rows], dtype=np.int32)
    sequence_id = np.array([chain + [-1] * (T - len(chain)) for chain in chains], dtype=np.int32)
    return StemInputs(padded, sequence_id, np.stack(places))


class MLXEsmFold2SingleToPair(Module):
    """Products and differences of the states of two residues, and a network: [B, L, C] to [B, L, L, C]."""

    def __init__(self, config: Any):
        super().__init__()
        C = config.pairwise_hidden_size
        self.downproject = Linear(C, C)
        self.output_fc1 = Linear(2 * C, C)
        self.output_fc2 = Linear(C, C)

    def __call__(self, x: mx.array, norm: LayerNorm | None = None) -> mx.array:
        """Return the pair states, normalized by `norm` if it is given."""
        x = self.downproject(x)
        product, difference = mx.split(self.output_fc1.weight, 2, axis=1)
        # Project before taking differences: 2 L projections instead of L².
        plus, minus = ops.linear(x, difference, self.output_fc1.bias), ops.linear(x, difference)

        def step(x_i: mx.array, plus_i: mx.array) -> mx.array:
            along = plus_i[:, :, None] - minus[:, None]
            hidden = ops.gelu(ops.linear(x_i[:, :, None] * x[:, None], product, residual=along))
            y = self.output_fc2(hidden)
            return y if norm is None else norm(y)

        return by_rows(step, rows_at_a_time(x.size), x, plus)


class MLXEsmFold2LanguageModelEncoder(Module):
    """Pair states from the hidden states of all layers of ESMC."""

    def __init__(self, config: Any):
        super().__init__()
        C, stem = config.pairwise_hidden_size, config.esmc_config
        self.single_to_pair = MLXEsmFold2SingleToPair(config)
        self.pair_output_norm = LayerNorm(C)
        self.pair_input_norm = LayerNorm(stem.hidden_size)
        self.pair_proj = Linear(stem.hidden_size, C, bias=False)
        self.layer_weights = mx.zeros(stem.num_hidden_layers + 1)

    def combine(self, hidden_states: mx.array) -> mx.array:
        """Return the states of the tokens [B, L, C] from all hidden states [B, L, layers + 1, D]."""
        weights = mx.softmax(self.layer_weights.astype(mx.float32)).astype(hidden_states.dtype)
        return self.pair_proj((self.pair_input_norm(hidden_states) * weights[:, None]).sum(axis=2))

    def run_stem(self, esmc: MLXEsmcModel, inputs: StemInputs) -> mx.array:
        """Return what `combine` does, [B, L, C], and add the hidden states up while the language model runs.

        Tokens that are no residues of a protein have hidden states of 0.
        """
        hidden_states, layout, positions = esmc.embed(
            mx.array(inputs.input_ids), sequence_id=mx.array(inputs.sequence_id)
        )
        weights = mx.softmax(self.layer_weights.astype(mx.float32))
        mixed = weights[0] * self.pair_input_norm(mx.stop_gradient(hidden_states)).astype(mx.float32)
        for i, layer in enumerate(esmc.layers, start=1):
            hidden_states, _ = layer(hidden_states, layout, positions)
            state = esmc.norm(hidden_states) if i == len(esmc.layers) else hidden_states
            mixed = mixed + weights[i] * self.pair_input_norm(mx.stop_gradient(state)).astype(mx.float32)
            evaluate(mixed)
        mixed = mx.take_along_axis(layout.unpack(mixed), mx.array(np.maximum(inputs.place, 0))[..., None], axis=1)
        # transformers gives other tokens hidden states of 0, whose norm is its bias.
        mixed = mx.where(mx.array(inputs.place >= 0)[..., None], mixed, self.pair_input_norm.bias.astype(mx.float32))
        return self.pair_proj(mixed.astype(ops.computing_dtype(self.pair_proj.weight.dtype)))

    def __call__(self, states: mx.array) -> mx.array:
        """Return pair states [B, L, L, C] from the states of the tokens [B, L, C]."""
        return self.single_to_pair(states, self.pair_output_norm)
