"""ESMFold in MLX: from a sequence to a structure (Lin et al. 2023; Science, doi:10.1126/science.ade2574).

From top to bottom: confidence, and the model, whose trunk, structure module and PDB text have their own files. Modules
and parameters have the names of transformers' `models/esm/modeling_esmfold.py`.

In shapes, B is the batch, L the residues and C the width of a pair's state.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from transformers import PreTrainedConfig

from mlx_esm_hf import ops
from mlx_esm_hf.dtypes import as_dtype
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_inputs import as_array, refuse_arguments
from mlx_esm_hf.modeling_layers import Embedding, FrozenBuffers, LayerNorm, Linear
from mlx_esm_hf.modeling_outputs import MLXEsmForProteinFoldingOutput
from mlx_esm_hf.models.esm.modeling_esm import MLXEsmModel, MLXEsmPreTrainedModel
from mlx_esm_hf.models.esm.names import TRANSFORMERS_4, TRANSFORMERS_5
from mlx_esm_hf.models.esmfold import residue_constants
from mlx_esm_hf.models.esmfold.protein import UNKNOWN, check_folding_inputs, encode_sequence, pad_rows, pdb_text
from mlx_esm_hf.models.esmfold.trunk import MLXEsmFoldingTrunk
from mlx_esm_hf.runtime.memory import evaluate

DISTOGRAM_BINS = 64
LDDT_BINS = 50
MAX_ALIGNED_ERROR = 31.0  # in Å, lower edge of the last bin

# The trunk's embedding table and head have rows for the residues, X, and two ids that are not used.
NUM_AA_TOKENS = len(residue_constants.RESTYPES) + 3

# Confidence


def categorical_lddt(logits: mx.array) -> mx.array:
    """Return the expected lDDT [...], 0 to 1, of logits [..., 50] over equal bins."""
    centers = (np.arange(LDDT_BINS, dtype=np.float32) + 0.5) / LDDT_BINS
    return (ops.softmax(logits) * mx.array(centers)).sum(axis=-1)


def aligned_error_centers() -> mx.array:
    """Return the centers [64] of the bins of the aligned error, in Å."""
    step = MAX_ALIGNED_ERROR / (DISTOGRAM_BINS - 2)
    return mx.array((np.arange(DISTOGRAM_BINS) * step + step / 2).astype(np.float32))


def compute_tm(probabilities: mx.array, mask: mx.array) -> mx.array:
    """Return the predicted TM-score [B] of each protein, for its best alignment.

    Args:
        probabilities: [B, L, L, 64], over bins of the aligned error.
        mask: [B, L], 0 at padding, which is excluded from the length and the alignments.

    Source: Jumper et al. 2021, Supplement 1.9.7.
    """
    mask = mask.astype(mx.float32)
    length = mask.sum(axis=-1)
    d0 = 1.24 * (mx.maximum(length, 19) - 15) ** (1 / 3) - 1.8
    terms = 1 / (1 + (aligned_error_centers() / d0[:, None]) ** 2)  # [B, 64]
    expected = (probabilities * terms[:, None, None]).sum(axis=-1)
    by_alignment = (expected * mask[:, None]).sum(axis=-1) / (length[:, None] + 1e-8)
    return mx.where(mask > 0, by_alignment, 0).max(axis=-1)


# The model


class MLXEsmForProteinFolding(FrozenBuffers, MLXEsmPreTrainedModel):
    """ESMFold: an ESM-2 stem, the folding trunk, and a structure with its confidence.

    The stem is frozen. With `esmfold_config.fp16_esm` its weights are float16, also when they are saved. The trunk is
    float32 or bfloat16. Frames and atoms are always float32.

    Args:
        config: an `MLXEsmConfig` or transformers' `EsmConfig` with `is_folding_model=True`.

    Example:
        >>> from mlx_esm_hf import MLXEsmForProteinFolding
        >>> model = MLXEsmForProteinFolding.from_pretrained("facebook/esmfold_v1")
        >>> output = model.infer("MLKNVQVQLV")
        >>> output.positions[-1].shape
        (1, 10, 14, 3)
        >>> pdb = model.infer_pdb("MLKNVQVQLV:MKTAYIAKQR")  # two chains
    """

    dialects = (TRANSFORMERS_4, TRANSFORMERS_5)  # fair-esm's `lm_head` is a different layer
    buffers = (*MLXEsmPreTrainedModel.buffers, "af2_to_esm")
    required = (*MLXEsmPreTrainedModel.required, "trunk.", "esm_s_", "embedding.")
    quantized = ()
    plain = ("trunk.",)
    frozen = ("af2_to_esm",)
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
    def dtype(self) -> mx.Dtype:
        """Dtype of the trunk; the stem may have another."""
        return self.esm_s_combine.dtype

    def set_chunk_size(self, chunk_size: int | None) -> None:
        """Set how many rows of pairs to compute at a time; see `MLXEsmFoldingTrunk.set_chunk_size`."""
        self.trunk.set_chunk_size(chunk_size)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        masking_pattern: Any = None,
        num_recycles: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> MLXEsmForProteinFoldingOutput | tuple:
        """Predict structures.

        Args:
            input_ids: [B, L], residues in AlphaFold's order ("ARNDCQEGHILKMFPSTWYV", 20 for X), not ESM's tokens. The
                tokenizer of the published checkpoint returns them with `add_special_tokens=False`. Padding can have any
                of these ids.
            attention_mask: [B, L], 1 for residues, 0 for padding, which must be on the right.
            position_ids: [B, L], [1, L] or [L], integers; by default residues are counted from 0. Only differences
                matter, up to the config's `position_bins`.
            masking_pattern: [B, L], 1 for residues that are masked in the stem's input only. Different patterns give
                different structures, as in fair-esm (transformers raises an error).
            num_recycles: repetitions after the first pass; default: `max_recycles` passes in total, from the config.
            output_hidden_states: accepted as in transformers, whose output has no hidden states either.
            return_dict: return an output object instead of a tuple; default: the config's value.
            ignored: `use_cache`, `token_type_ids` and other arguments of transformers that have no effect here.

        Returns:
            The output. Its `ptm` has one value per protein. transformers returns one for the batch, which depends on
            padding; for a single protein they agree.

        Raises:
            ValueError: invalid ids, padding on the left or between residues, an empty protein, or wrong shapes.
        """
        refuse_arguments(ignored)
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
        return self.output_or_tuple(output, return_dict)

    def heads(self, structure: dict[str, mx.array], mask: mx.array) -> dict[str, mx.array]:
        """Return the outputs of the heads: distances, residues and confidence.

        Args:
            structure: result of the trunk.
            mask: [B, L].
        """
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
        """Return the mean of the stem's hidden states [B, L, hidden_size] weighted by `esm_s_combine`.

        The states of the layers are added one by one, so memory never holds all of them. The dtype is the trunk's.
        """
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
        """Return the stem's tokens [B, L + 2], with <cls> and <eos>, and their mask."""
        vocabulary = list(self.config.vocab_list)
        cls, pad, eos, masked = (vocabulary.index(token) for token in ("<cls>", "<pad>", "<eos>", "<mask>"))
        tokens = self.af2_to_esm[mx.where(mask == 1, aatype + 1, 0)].astype(mx.int32)
        if masking_pattern is not None:
            if masking_pattern.shape != aatype.shape:
                raise UserError(
                    f"masking_pattern must have the shape of input_ids, {aatype.shape}, got {masking_pattern.shape}."
                )
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
            sequences: one sequence, or several to fold as a batch, in capital letters. Letters other than the 20 amino
                acids are folded as X, which has no atoms. ":" separates the chains of a protein; they are folded as one
                sequence with linkers between them.
            residx: [B, L], positions to use instead of the default, where L is the length of the longest sequence with
                linkers. `residue_index_offset` is ignored then.
            masking_pattern: [B, L]; see `__call__`.
            num_recycles: see `__call__`.
            residue_index_offset: jump of the positions from one chain to the next, in addition to the linker.
            chain_linker: residues between two chains.

        Returns:
            The output of `__call__`, with `chain_index`. In `atom37_atom_exists`, linkers have no atoms.

        Raises:
            ValueError: an empty sequence or chain, or other characters than capital letters.

        Source: fair-esm's `ESMFold.infer`.
        """
        sequences = [sequences] if isinstance(sequences, str) else list(sequences)
        if not sequences:
            raise UserError("sequences must not be empty.")
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
        """Return the PDB file of each protein as text.

        Chains are named from A, residues of each chain are numbered from 1, and B factors are pLDDT, 0 to 100.
        transformers numbers residues by position and writes pLDDT from 0 to 1.

        Args:
            output: result of `infer` or of a call.

        Raises:
            ValueError: more chains than a PDB file has names for.
        """
        aatype, plddt, exists = (np.array(output[name]) for name in ("aatype", "plddt", "atom37_atom_exists"))
        positions = np.array(atom14_to_atom37(output.positions[-1], output))
        texts = []
        for i, residues in enumerate(aatype):
            modeled = exists[i].any(axis=1)
            if output.chain_index is None:  # a call does not return its mask: padding follows the last atom
                chains = np.where(np.arange(len(residues)) <= np.flatnonzero(modeled).max(initial=-1), 0, -1)
            else:  # residues without atoms are X or linkers
                chains = np.where(modeled | (residues == UNKNOWN), np.array(output.chain_index[i]), -1)
            texts.append(pdb_text(residues, chains, positions[i], exists[i], 100 * plddt[i]))
        return texts

    def infer_pdb(self, sequence: str, *args: Any, **kwargs: Any) -> str:
        """Fold one protein and return its PDB file as text; see `infer` and `output_to_pdb`."""
        if not isinstance(sequence, str):
            raise UserError("infer_pdb expects one sequence; use infer_pdbs for a list.")
        return self.infer_pdbs([sequence], *args, **kwargs)[0]

    def infer_pdbs(self, sequences: list[str], *args: Any, **kwargs: Any) -> list[str]:
        """Fold proteins and return the PDB file of each as text; see `infer` and `output_to_pdb`."""
        return self.output_to_pdb(self.infer(sequences, *args, **kwargs))

    # Loading

    def loaded_dtype(self, name: str, dtype: mx.Dtype) -> mx.Dtype:
        """Return the dtype of a parameter if the model is loaded in `dtype`; with `fp16_esm` the stem stays float16.

        Raises:
            ValueError: the trunk would be float16.
        """
        if name.startswith("esm.") and self.config.esmfold_config.fp16_esm:
            return mx.float16
        refuse_float16(dtype)
        return dtype

    def to(self, *args: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
        """Cast stem and trunk; see `MLXPreTrainedModel.to`.

        Raises:
            ValueError: the dtype is float16, in which the trunk overflows.
        """
        for wanted in (*args, dtype):
            refuse_float16(as_dtype(wanted))
        return super().to(*args, dtype=dtype, device=device, **kwargs)


def refuse_float16(dtype: mx.Dtype | None) -> None:
    """Raise ValueError if `dtype` is float16."""
    if dtype is not None and dtype == mx.float16:  # MLX cannot compare a dtype with None
        raise UserError(
            "The folding trunk cannot be float16: its triangle multiplications overflow, and most structures become "
            "NaN. Use float32 or bfloat16; with esmfold_config.fp16_esm the ESM-2 stem stays in float16."
        )


def stem_config(config: PreTrainedConfig) -> Any:
    """Return the config of a folding model's language model: a copy with folding switched off."""
    config = copy.deepcopy(config)
    config.is_folding_model = False
    config.esmfold_config = None
    return config


def atoms(aatype: mx.array, mask: mx.array) -> dict[str, mx.array]:
    """Return the masks and indices of the atoms of each residue [B, L], in both orders; padding has no atoms."""
    exists = mask[..., None].astype(mx.float32)
    return {
        "atom14_atom_exists": mx.array(residue_constants.ATOM14_MASK)[aatype] * exists,
        "atom37_atom_exists": mx.array(residue_constants.ATOM37_MASK)[aatype] * exists,
        "residx_atom14_to_atom37": mx.array(residue_constants.ATOM14_TO_ATOM37)[aatype],
        "residx_atom37_to_atom14": mx.array(residue_constants.ATOM37_TO_ATOM14)[aatype],
    }


def atom14_to_atom37(atom14: mx.array, output: Any) -> mx.array:
    """Convert positions [B, L, 14, 3] to [B, L, 37, 3], with zeros for missing atoms."""
    places = output.residx_atom37_to_atom14
    return mx.take_along_axis(atom14, places[..., None], axis=2) * output.atom37_atom_exists[..., None]


def mean_plddt(plddt: mx.array | None, exists: mx.array | None) -> mx.array:
    """Return the mean pLDDT [B] over the atoms of each protein; 0 for a protein without atoms."""
    assert plddt is not None and exists is not None
    return (plddt * exists).sum(axis=(1, 2)) / mx.maximum(exists.sum(axis=(1, 2)), 1)
