"""Outputs of the models: transformers' output classes with `mx.array` fields.

Each supports access by attribute (`out.logits`), key (`out["logits"]`) and index (`out[0]`), and `to_tuple()`. The
last two skip fields that are None. B is the batch, L the tokens, D the hidden size, H the heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from transformers.utils import ModelOutput

from mlx_esm_hf.dtypes import name_of


class MLXModelOutput(ModelOutput):
    """Base of the outputs. Its repr has the dtypes and shapes of the arrays, and does not compute them."""

    def __repr__(self) -> str:
        fields = "".join(f"\n  {name}={_described(value)}," for name, value in self.items())
        return f"{type(self).__name__}({fields}\n)"


def _described(value: Any) -> str:
    if isinstance(value, tuple):  # of arrays of the same shape
        return f"{len(value)} x {_described(value[0])}" if value else "()"
    return f"{name_of(value.dtype)}{list(value.shape)}"


@dataclass(repr=False)
class MLXBaseModelOutput(MLXModelOutput):
    """Output of an encoder and of `MLXEsmcModel`.

    Attributes:
        last_hidden_state: [B, L, D].
        hidden_states: one [B, L, D] for the embeddings and one for each layer.
        attentions: one [B, H, L, L] for each layer.
    """

    last_hidden_state: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None


@dataclass(repr=False)
class MLXBaseModelOutputWithPooling(MLXModelOutput):
    """Output of `MLXEsmModel`: the encoder's fields and `pooler_output` [B, D]."""

    last_hidden_state: mx.array | None = None
    pooler_output: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None


@dataclass(repr=False)
class MLXMaskedLMOutput(MLXModelOutput):
    """Output of the masked language models: `loss` [] and `logits` [B, L, vocab_size]."""

    loss: mx.array | None = None
    logits: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None


@dataclass(repr=False)
class MLXSequenceClassifierOutput(MLXModelOutput):
    """Output of the sequence classifiers: `loss` [] and `logits` [B, num_labels]."""

    loss: mx.array | None = None
    logits: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None


@dataclass(repr=False)
class MLXTokenClassifierOutput(MLXModelOutput):
    """Output of the token classifiers: `loss` [] and `logits` [B, L, num_labels]."""

    loss: mx.array | None = None
    logits: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None


@dataclass(repr=False)
class MLXEsmForProteinFoldingOutput(MLXModelOutput):
    """Output of `MLXEsmForProteinFolding`: the last pass of the trunk, for B proteins of at most L residues.

    N is the number of blocks of the structure module; the last block is the result. Positions are in Å. At padding the
    masks are 0 and all other values are finite but unspecified.

    Attributes:
        frames: [N, B, L, 7], quaternion (w, x, y, z) and translation.
        sidechain_frames: [N, B, L, 8, 4, 4], homogeneous transformations of the rigid groups.
        unnormalized_angles: [N, B, L, 7, 2], like `angles` before normalization.
        angles: [N, B, L, 7, 2], (sine, cosine) of ω, φ, ψ and χ1 to χ4.
        positions: [N, B, L, 14, 3], of the atoms of `atom14`.
        states: [N, B, L, sequence_dim].
        s_s: [B, L, sequence_state_dim], residue states at the end of the trunk.
        s_z: [B, L, L, pairwise_state_dim], pair states at the end of the trunk.
        distogram_logits: [B, L, L, 64].
        lm_logits: [B, L, 23].
        aatype: [B, L], residues in AlphaFold's order, 20 for X.
        atom14_atom_exists: [B, L, 14], 1 for atoms of the residue; 0 at padding.
        atom37_atom_exists: [B, L, 37], the same; from `infer`, also 0 on linkers between chains.
        residx_atom14_to_atom37: [B, L, 14], index of each atom in `atom37`.
        residx_atom37_to_atom14: [B, L, 37], index of each atom in `atom14`.
        residue_index: [B, L], the positions passed to the trunk.
        lddt_head: [N, B, L, 37, 50], logits.
        plddt: [B, L, 37], predicted lDDT of each atom, 0 to 1; meaningful for existing atoms only.
        ptm_logits: [B, L, L, 64].
        ptm: [B], predicted TM-score of each protein. transformers returns one number, which is correct for a single
            protein.
        aligned_confidence_probs: [B, L, L, 64], over bins of the aligned error.
        predicted_aligned_error: [B, L, L], in Å: error of residue j when the structures are aligned on residue i.
        max_predicted_aligned_error: [], its upper bound, 31.75 Å.
        mean_plddt: [B], over existing atoms, 0 to 1.
        chain_index: [B, L], index of the chain, from 0; a linker belongs to the chain before it, and padding is −1.
            Set by `infer` only.
    """

    frames: mx.array | None = None
    sidechain_frames: mx.array | None = None
    unnormalized_angles: mx.array | None = None
    angles: mx.array | None = None
    positions: mx.array | None = None
    states: mx.array | None = None
    s_s: mx.array | None = None
    s_z: mx.array | None = None
    distogram_logits: mx.array | None = None
    lm_logits: mx.array | None = None
    aatype: mx.array | None = None
    atom14_atom_exists: mx.array | None = None
    residx_atom14_to_atom37: mx.array | None = None
    residx_atom37_to_atom14: mx.array | None = None
    atom37_atom_exists: mx.array | None = None
    residue_index: mx.array | None = None
    lddt_head: mx.array | None = None
    plddt: mx.array | None = None
    ptm_logits: mx.array | None = None
    ptm: mx.array | None = None
    aligned_confidence_probs: mx.array | None = None
    predicted_aligned_error: mx.array | None = None
    max_predicted_aligned_error: mx.array | None = None
    mean_plddt: mx.array | None = None
    chain_index: mx.array | None = None


@dataclass(repr=False)
class MLXEsmFold2TrunkOutput(MLXModelOutput):
    """Output of `MLXEsmFold2Model`: the trunk, for B proteins of at most L tokens.

    C is the width of a pair's state. Values at padding are finite but unspecified. The last two fields are computed
    when they are first used.

    Attributes:
        distogram_logits: [B, L, L, bins], symmetric, over distances of representative atoms.
        pair_states: [B, L, L, C], in float32.
        single_inputs: [B, L, single_inputs_size], states of the tokens from the features.
        relative_position_encoding: [B, L, L, C].
        token_bonds_encoding: [B, L, L, C].
    """

    distogram_logits: mx.array | None = None
    pair_states: mx.array | None = None
    single_inputs: mx.array | None = None
    relative_position_encoding: mx.array | None = None
    token_bonds_encoding: mx.array | None = None


@dataclass(repr=False)
class MLXEsmFold2Output(MLXModelOutput):
    """Output of `MLXEsmFold2Model.fold`: S samples of B proteins of at most L tokens and A atoms.

    N = B · S, and the sample varies fastest. Values at padding are 0. All are float32 except four kinds of logits,
    which have the dtype of the activations.

    Attributes:
        distogram_logits: [B, L, L, bins], the same for all samples.
        sample_atom_coords: [N, A, 3], in Å. The pose of each sample is arbitrary.
        plddt_logits: [N, A, 50].
        plddt: [N, L], predicted lDDT of each token, the mean over its atoms, 0 to 1.
        plddt_per_atom: [N, A].
        plddt_ca: [N, L], of the Cα; of the representative atom for tokens without Cα. In transformers it is that of Cβ.
        complex_plddt: [N], mean over the atoms.
        complex_iplddt: [N], mean over the atoms of ligands, with weight 2, and of interfaces.
        pae_logits: [N, L, L, 64].
        pae: [N, L, L], predicted aligned error in Å, 0 to 32.
        pde_logits: [N, L, L, 64].
        pde: [N, L, L], predicted error of distances in Å, 0 to 32.
        resolved_logits: [N, A, 2], not resolved and resolved.
        ptm: [N], predicted TM-score.
        iptm: [N], predicted TM-score of interfaces; 0 for a single chain.
        pair_chains_iptm: [N, K, K] for K chains; the diagonal is within a chain.
    """

    distogram_logits: mx.array | None = None
    sample_atom_coords: mx.array | None = None
    plddt_logits: mx.array | None = None
    plddt: mx.array | None = None
    plddt_per_atom: mx.array | None = None
    plddt_ca: mx.array | None = None
    complex_plddt: mx.array | None = None
    complex_iplddt: mx.array | None = None
    pae_logits: mx.array | None = None
    pae: mx.array | None = None
    pde_logits: mx.array | None = None
    pde: mx.array | None = None
    resolved_logits: mx.array | None = None
    ptm: mx.array | None = None
    iptm: mx.array | None = None
    pair_chains_iptm: mx.array | None = None
