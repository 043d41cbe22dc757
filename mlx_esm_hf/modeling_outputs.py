"""What the models return: transformers' output classes, with `mx.array` in them.

Each supports attribute (`out.logits`), key (`out["logits"]`) and index (`out[0]`) access and `to_tuple()`; fields
that are None are left out of the last two. B is the batch, L the tokens, D the hidden size, H the heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from transformers.utils import ModelOutput


@dataclass
class MLXBaseModelOutput(ModelOutput):
    """Of the encoder, and of `MLXEsmcModel`: `last_hidden_state` [B, L, D]; `hidden_states`, one [B, L, D] for the
    embeddings and each layer; `attentions`, one [B, H, L, L] for each layer."""

    last_hidden_state: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None


@dataclass
class MLXBaseModelOutputWithPooling(ModelOutput):
    """Of `MLXEsmModel`: the encoder's output and `pooler_output` [B, D]."""

    last_hidden_state: mx.array | None = None
    pooler_output: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None


@dataclass
class MLXMaskedLMOutput(ModelOutput):
    """Of `MLXEsmForMaskedLM`: `loss` [] and `logits` [B, L, vocab_size]."""

    loss: mx.array | None = None
    logits: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None


@dataclass
class MLXSequenceClassifierOutput(ModelOutput):
    """Of `MLXEsmForSequenceClassification`: `loss` [] and `logits` [B, num_labels]."""

    loss: mx.array | None = None
    logits: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None


@dataclass
class MLXTokenClassifierOutput(ModelOutput):
    """Of `MLXEsmForTokenClassification`: `loss` [] and `logits` [B, L, num_labels]."""

    loss: mx.array | None = None
    logits: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None


@dataclass
class MLXEsmForProteinFoldingOutput(ModelOutput):
    """Of `MLXEsmForProteinFolding`: what the last pass through the trunk made of B proteins of at most L residues.

    N is the structure module's blocks, whose last one is the result. Positions are in Å. At padding the values are
    finite and otherwise unspecified, but for the masks, which are 0 there.

    Args:
        frames: [N, B, L, 7], a quaternion (w, x, y, z) and a translation.
        sidechain_frames: [N, B, L, 8, 4, 4], homogeneous transformations of the rigid groups.
        unnormalized_angles, angles: [N, B, L, 7, 2], (sine, cosine) of ω, φ, ψ and χ1 to χ4.
        positions: [N, B, L, 14, 3], of the atoms of `atom14`.
        states: [N, B, L, sequence_dim].
        s_s, s_z: [B, L, sequence_state_dim] and [B, L, L, pairwise_state_dim], as they leave the trunk.
        distogram_logits: [B, L, L, 64].
        lm_logits: [B, L, 23].
        aatype: [B, L], residues in AlphaFold's order, 20 for X.
        atom14_atom_exists, atom37_atom_exists: [B, L, 14] and [B, L, 37], 1 where the residue has this atom; 0 at
            padding and, in `atom37_atom_exists` of `infer`, on linkers between chains.
        residx_atom14_to_atom37, residx_atom37_to_atom14: [B, L, 14] and [B, L, 37], which atom of the other kind it is.
        residue_index: [B, L], the positions that the trunk was given.
        lddt_head: [N, B, L, 37, 50], logits.
        plddt: [B, L, 37], the predicted lDDT of each atom, 0 to 1; it means something where the atom exists.
        ptm_logits: [B, L, L, 64].
        ptm: [B], the predicted TM-score of each protein. transformers has one number, right for a single protein.
        aligned_confidence_probs: [B, L, L, 64], over bins of the aligned error.
        predicted_aligned_error: [B, L, L], in Å, of residue j when the structures are laid upon each other at i.
        max_predicted_aligned_error: [], the largest that there can be, 31.75 Å.
        mean_plddt: [B], over the atoms that exist, 0 to 1.
        chain_index: [B, L], the number of the chain, from 0; a linker belongs to the chain before it, and padding
            is −1. Of `infer` alone.
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
