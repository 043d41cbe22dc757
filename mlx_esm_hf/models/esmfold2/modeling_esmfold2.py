"""ESMFold2 in MLX: from a sequence to structures of all atoms.

The language model ESMC gives pair states, a trunk of pair layers refines them in loops, a diffusion model samples the
positions of the atoms, and a confidence head scores each sample. The parts have their own files. Modules and parameters
have the names of transformers' `models/esmfold2/modeling_esmfold2.py`.

In shapes, B is the batch, S the samples, A the atoms, L the tokens and C the width of a pair's state.

Source: Biohub 2026, ESMFold2 (https://huggingface.co/biohub/ESMFold2), and its published code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from transformers import PreTrainedConfig

from mlx_esm_hf import ops
from mlx_esm_hf.checkpoint.read import load_files
from mlx_esm_hf.checkpoint.resolve import checkpoint_files
from mlx_esm_hf.demo import shown_name
from mlx_esm_hf.errors import CheckpointError, UserError
from mlx_esm_hf.loading import commit_of, read_config
from mlx_esm_hf.modeling_inputs import as_array
from mlx_esm_hf.modeling_layers import FrozenBuffers, Linear
from mlx_esm_hf.modeling_outputs import MLXEsmFold2Output, MLXEsmFold2TrunkOutput
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.models.esmc.configuration_esmc import MLXEsmcConfig
from mlx_esm_hf.models.esmc.modeling_esmc import MLXEsmcForMaskedLM, MLXEsmcModel
from mlx_esm_hf.models.esmfold2.confidence import MLXEsmFold2ConfidenceHead
from mlx_esm_hf.models.esmfold2.configuration_esmfold2 import MLXEsmFold2Config, as_mlx_config, check_config
from mlx_esm_hf.models.esmfold2.diffusion import MLXEsmFold2DiffusionModule
from mlx_esm_hf.models.esmfold2.features import check_features, pad_features, protein_features
from mlx_esm_hf.models.esmfold2.language_model import MLXEsmFold2LanguageModelEncoder, stem_inputs
from mlx_esm_hf.models.esmfold2.msa import MLXEsmFold2MSAEncoder
from mlx_esm_hf.models.esmfold2.names import BIOHUB, TRANSFORMERS, unpacked
from mlx_esm_hf.models.esmfold2.protein import output_to_pdb
from mlx_esm_hf.models.esmfold2.sampler import Draws, sample
from mlx_esm_hf.models.esmfold2.trunk import (
    MLXEsmFold2InputEmbedder,
    MLXEsmFold2PairUpdateStack,
    MLXEsmFold2Parcae,
    initial_std,
)
from mlx_esm_hf.ops.pairs import rows_at_a_time
from mlx_esm_hf.quantization.layers import prefixed_block
from mlx_esm_hf.runtime.memory import evaluate

# Parts of names of parameters that stay float32 in half precision, as in transformers.
FLOAT32 = ("norm.weight", "norm.bias", "norm_mix", "norm_start", "norm_single", "distogram_head", "parcae.log_delta")

TOKENS_AT_A_TIME = 2048  # of all samples that the denoiser computes together

# The features of atoms and of tokens that have an axis of atoms.
ATOM_FEATURES = (
    *("ref_pos", "ref_charge", "ref_element", "ref_atom_name_chars", "ref_space_uid", "atom_to_token"),
    "atom_attention_mask",
)
MSA_FEATURES = ("msa", "msa_attention_mask", "has_deletion", "deletion_value")


class MLXEsmFold2Model(FrozenBuffers, MLXPreTrainedModel):
    """ESMFold2 and ESMFold2-Fast.

    The language model is frozen and may be quantized (`mlx-esm convert --quantize`). The trunk is float32, bfloat16 or
    float16; positions of atoms are always float32.

    Args:
        config: an `MLXEsmFold2Config` or transformers' `EsmFold2Config`.

    Example:
        >>> from mlx_esm_hf import MLXEsmFold2Model
        >>> model = MLXEsmFold2Model.from_pretrained("biohub/ESMFold2-Fast")
        >>> output = model.infer_protein("MLKNVQVQLV:MKTAYIAKQR", num_diffusion_samples=2)  # two chains
        >>> output.sample_atom_coords.shape, output.ptm.shape
        ((2, 160, 3), (2,))
        >>> pdb = model.infer_protein_as_pdb("MLKNVQVQLV")
    """

    config_class = MLXEsmFold2Config
    main_input_name = "token_index"
    supports_gradient_checkpointing = False
    base_model_prefix = "esmfold2"
    dialects = (TRANSFORMERS, BIOHUB)
    stored_buffers = ("fourier.frequencies", "fourier.phases", "confidence_head.boundaries")
    folding_parts = (
        *("input_embedder.", "language_model.", "folding_trunk.", "lm_encoder.", "parcae.", "structure_head."),
        *("distogram_head.", "confidence_head."),
    )
    required = (*folding_parts, "msa_encoder.", "esmc.embed_tokens.", "esmc.layers.", "esmc.norm.")
    quantized = ("esmc.layers.",)
    plain = (*folding_parts, "msa_encoder.")
    input_embeddings = "esmc.embed_tokens"

    def __init__(self, config: PreTrainedConfig):
        super().__init__(self.checked_config(config))
        self.config: MLXEsmFold2Config
        config = self.config
        self.input_embedder = MLXEsmFold2InputEmbedder(config)
        self.language_model = MLXEsmFold2LanguageModelEncoder(config)
        self.esmc: MLXEsmcModel | None = MLXEsmcModel(config.esmc_config)
        self.esmc.freeze()
        self.folding_trunk = MLXEsmFold2PairUpdateStack(config, config.folding_trunk_num_hidden_layers)
        self.lm_encoder = MLXEsmFold2PairUpdateStack(config, config.lm_encoder.num_hidden_layers)
        self.parcae = MLXEsmFold2Parcae(config)
        self.structure_head = MLXEsmFold2DiffusionModule(config)
        self.distogram_head = Linear(config.pairwise_hidden_size, config.structure_head.num_distogram_bins)
        self.confidence_head = MLXEsmFold2ConfidenceHead(config)
        if config.msa_encoder.enabled:
            self.msa_encoder = MLXEsmFold2MSAEncoder(config)
        self.on_step: Callable[[str], None] | None = None  # called with what is computed next

    # The trunk

    def __call__(
        self,
        num_loops: int | None = None,
        lm_hidden_states: Any = None,
        language_states: mx.array | None = None,
        seed: int = 0,
        draws: Draws | None = None,
        **features: Any,
    ) -> MLXEsmFold2TrunkOutput:
        """Run the trunk.

        Args:
            num_loops: repetitions after the first pass; default: the config's number.
            lm_hidden_states: [B, L, layers + 1, width], all hidden states of ESMC; by default they are computed.
            language_states: [B, L, C], result of `language_states`, instead of running ESMC.
            seed: seed of the initial states and of the dropout of ESMC's pair states.
            draws: random numbers to use instead of the seed's.
            features: see `features.protein_features`. Without `input_ids`, `language_states` and `lm_hidden_states` the
                language model takes no part.

        Raises:
            ValueError: a feature is missing, or has a wrong shape or values. TypeError: it is unknown.
        """
        arrays = check_features(features)
        z, single_inputs = self.run_trunk(arrays, num_loops, lm_hidden_states, language_states, seed, draws)
        embedder = self.input_embedder
        bonds = embedder.bonds(arrays)
        return MLXEsmFold2TrunkOutput(
            distogram_logits=self.distogram(z),
            pair_states=z,
            single_inputs=single_inputs,
            relative_position_encoding=embedder.rel_pos(arrays),
            token_bonds_encoding=mx.zeros(z.shape, dtype=single_inputs.dtype) if bonds is None else bonds,
        )

    def run_trunk(
        self,
        features: Mapping[str, mx.array],
        num_loops: int | None,
        lm_hidden_states: Any,
        language_states: mx.array | None,
        seed: int,
        draws: Draws | None,
    ) -> tuple[mx.array, mx.array]:
        """Return the pair states [B, L, L, C] in float32, and the states of the tokens [B, L, single_inputs_size].

        Args:
            features: checked features.
            num_loops: this and the other arguments are those of `__call__`.
            lm_hidden_states: [B, L, layers + 1, width].
            language_states: [B, L, C].
            seed: seed of the draws.
            draws: random numbers.
        """
        config, embedder = self.config, self.input_embedder
        dtype = ops.computing_dtype(self.dtype)
        draws = draws or self.draws(features, seed)
        mask = features["attention_mask"].astype(dtype)
        if lm_hidden_states is not None:
            language_states = self.language_model.combine(as_array(lm_hidden_states).astype(dtype))
        elif language_states is None and "input_ids" in features:
            language_states = self.language_states(features)
        single_inputs = embedder.single_inputs(features)
        injected = embedder.initial_pair_states(single_inputs, features)
        evaluate(injected)
        if "msa" in features and config.msa_encoder.enabled:
            self.tell("alignment")
            injected = self.msa_encoder(injected, single_inputs, features)
        lm_states = None if language_states is None else self.language_model(language_states.astype(dtype))

        width, p = config.pairwise_hidden_size, config.lm_encoder.lm_dropout
        loops = (config.num_loops if num_loops is None else num_loops) + 1
        if loops < 1:
            raise UserError(f"num_loops must be at least 0, got {loops - 1}.")
        z = draws.state(width, initial_std(width)).astype(dtype)
        for loop in range(loops):
            self.tell(f"loop {loop + 1} of {loops}")
            added = injected
            if lm_states is not None:
                dropped = lm_states
                if p > 0 and config.lm_encoder.per_loop_lm_dropout:  # also in evaluation, as in transformers
                    dropped = lm_states * draws.keep(loop, width, p) / (1 - p)
                added = injected + self.lm_encoder(dropped, mask)
            z = self.parcae(z, added)
            evaluate(z)
            z = self.folding_trunk(z, mask)
        z = self.parcae.decode_state(z, mask).astype(mx.float32)
        evaluate(z)
        return z, single_inputs

    def distogram(self, z: mx.array) -> mx.array:
        """Return the logits [B, L, L, bins] of distances of representative atoms."""
        logits = self.distogram_head(z)  # the layer of z + its transpose, whose bias counts once
        return logits + logits.swapaxes(1, 2) - self.distogram_head.bias

    def draws(self, features: Mapping[str, mx.array], seed: int) -> Draws:
        """Return the random numbers of a seed for these proteins."""
        return Draws(seed, lengths(features["attention_mask"]), lengths(features["atom_attention_mask"]))

    def tell(self, what: str) -> None:
        """Tell the caller what is computed next."""
        if self.on_step is not None:
            self.on_step(what)

    # The language model

    def language_states(self, features: Mapping[str, Any]) -> mx.array:
        """Return the states [B, L, C] that the language model gives to the tokens: 1 kB per residue.

        Args:
            features: `input_ids`, `asym_id`, `residue_index`, `mol_type` and `attention_mask`, [B, L] each.

        Raises:
            ValueError: the language model was freed.
        """
        if self.esmc is None:
            raise UserError("The language model was freed (free_stem). Load the model again, or pass language_states.")
        self.tell("language model")
        names = ("input_ids", "asym_id", "residue_index", "mol_type", "attention_mask")
        inputs = stem_inputs(self.config.esmc_config, *(np.array(features[name]) for name in names))
        states = self.language_model.run_stem(self.esmc, inputs)
        evaluate(states)
        return states

    def free_stem(self) -> None:
        """Free the memory of the language model. Afterwards, folding needs `language_states`."""
        self.esmc = None

    # Structures

    def fold(
        self,
        *,
        num_diffusion_samples: int | None = None,
        num_sampling_steps: int | None = None,
        num_loops: int | None = None,
        seed: int = 0,
        draws: Draws | None = None,
        lm_hidden_states: Any = None,
        language_states: mx.array | None = None,
        **features: Any,
    ) -> MLXEsmFold2Output:
        """Predict structures of proteins and complexes from their features.

        The result for a protein and a seed does not depend on the rest of the batch or the number of samples.

        Args:
            num_diffusion_samples: structures of each protein; default: the config's number.
            num_sampling_steps: steps of the noise schedule before its top is cut; default: the config's number.
            num_loops: see `__call__`.
            seed: seed of all random numbers.
            draws: random numbers to use instead of the seed's.
            lm_hidden_states: see `__call__`.
            language_states: see `__call__`.
            features: see `features.protein_features`.

        Raises:
            ValueError: see `__call__`; or a number is out of range.
        """
        arrays = check_features(features)
        samples = (
            self.config.structure_head.num_diffusion_samples if num_diffusion_samples is None else num_diffusion_samples
        )
        if samples < 1:
            raise UserError(f"num_diffusion_samples must be at least 1, got {samples}.")
        draws = draws or self.draws(arrays, seed)
        z, single_inputs = self.run_trunk(arrays, num_loops, lm_hidden_states, language_states, seed, draws)
        distogram = self.distogram(z)
        evaluate(distogram)
        chains = int(arrays["asym_id"].max()) + 1
        results = []
        for row in range(len(z)):
            one = protein_at(arrays, row)
            L = one["attention_mask"].shape[1]
            states = z[row : row + 1, :L, :L], self.input_embedder.rel_pos(one), single_inputs[row : row + 1, :L]
            coords = self.sample_structures(*states, one, draws, row, samples, num_sampling_steps)
            results.append({"sample_atom_coords": coords, **self.score(*states, coords, one, chains)})
        shape = {"L": z.shape[1], "A": arrays["ref_pos"].shape[1]}
        return MLXEsmFold2Output(distogram_logits=distogram, **joined(results, **shape))

    def sample_structures(
        self,
        z: mx.array,
        relative: mx.array,
        single_inputs: mx.array,
        features: Mapping[str, mx.array],
        draws: Draws,
        row: int,
        samples: int,
        num_steps: int | None,
    ) -> mx.array:
        """Return structures [S, A, 3] of one protein, in Å, sampled a few at a time.

        Args:
            z: [1, L, L, C], pair states of the trunk.
            relative: [1, L, L, C], relative positions.
            single_inputs: [1, L, single_inputs_size].
            features: of the protein, without padding, with batch 1.
            draws: the random numbers.
            row: number of the protein in the batch.
            samples: S.
            num_steps: see `fold`.
        """
        conditioning = self.structure_head.prepare(z, relative, single_inputs, features)
        mask = features["atom_attention_mask"][0]
        head = self.config.structure_head

        def denoise(x: mx.array, noise_level: mx.array) -> mx.array:
            return self.structure_head(x, noise_level, conditioning)

        coords = []
        for group in groups(samples, max(1, TOKENS_AT_A_TIME // z.shape[1])):
            name = f"sample {group.start + 1}" if len(group) == 1 else f"samples {group.start + 1} to {group.stop}"

            def on_step(step: int, steps: int, name: str = name) -> None:
                self.tell(f"{name} of {samples}, step {step} of {steps}")

            coords.append(sample(denoise, mask, head, draws, row, group, num_steps, on_step))
        return mx.concatenate(coords) * mask[:, None]

    def score(
        self,
        z: mx.array,
        relative: mx.array,
        single_inputs: mx.array,
        coords: mx.array,
        features: Mapping[str, mx.array],
        num_chains: int,
    ) -> dict[str, mx.array]:
        """Return the confidence of structures of one protein, a few at a time; see `MLXEsmFold2Output`.

        Args:
            z: this and the next two arguments are those of `sample_structures`.
            relative: [1, L, L, C].
            single_inputs: [1, L, single_inputs_size].
            coords: [S, A, 3], in Å.
            features: of the protein, without padding, with batch 1.
            num_chains: chains of the output.
        """
        self.tell("confidence")
        base = self.confidence_head.input_embedder(single_inputs, z, relative, self.input_embedder.bonds(features))
        evaluate(base)
        scores = []
        for group in groups(len(coords), rows_at_a_time(base.size)):
            scored = self.confidence_head(base, coords[group.start : group.stop], features, num_chains)
            mx.eval(scored)
            scores.append(scored)
        return {name: mx.concatenate([scored[name] for scored in scores]) for name in scores[0]}

    def infer_protein(
        self, sequences: str | Sequence[str], msas: Sequence[Any] | None = None, **options: Any
    ) -> MLXEsmFold2Output:
        """Predict structures of proteins from their sequences.

        Args:
            sequences: one sequence, or several to fold as a batch, in capital letters, with ":" between the chains of a
                protein. X is an unknown residue.
            msas: for each protein, its alignments; see `features.protein_features`.
            options: arguments of `fold`.

        Raises:
            ValueError: an empty chain, or a letter that is no residue.
        """
        features: dict[str, Any] = self.features(sequences, msas)
        return self.fold(**features, **options)

    def infer_protein_as_pdb(self, sequence: str, sample_idx: int | None = None, **options: Any) -> str:
        """Predict the structure of one protein and return it as a PDB file; pLDDT (0 to 100) is the B factor.

        Args:
            sequence: see `infer_protein`.
            sample_idx: number of the sample; None for the one with the highest confidence, see `best_sample`.
            options: arguments of `infer_protein`.
        """
        if not isinstance(sequence, str):
            raise UserError("infer_protein_as_pdb expects one sequence; use infer_protein for a list.")
        features: dict[str, Any] = self.features(sequence, options.pop("msas", None))
        output: Any = self.fold(**features, **options)
        number = best_sample(output) if sample_idx is None else sample_idx
        if not 0 <= number < len(output.ptm):
            raise UserError(f"sample_idx must be between 0 and {len(output.ptm) - 1}, got {number}.")
        return output_to_pdb(
            features, np.array(output.sample_atom_coords[number]), np.array(output.plddt_per_atom[number])
        )

    def features(self, sequences: str | Sequence[str], msas: Sequence[Any] | None = None) -> dict[str, mx.array]:
        """Return the features of proteins as a batch; see `infer_protein`."""
        sequences = [sequences] if isinstance(sequences, str) else list(sequences)
        if not sequences:
            raise UserError("sequences must not be empty.")
        alignments = msas or [None] * len(sequences)
        if len(alignments) != len(sequences):
            raise UserError(f"msas must have one entry for each protein, {len(sequences)}, got {len(alignments)}.")
        if msas is not None and not self.config.msa_encoder.enabled:
            raise UserError("This checkpoint has no MSA encoder. Use biohub/ESMFold2, or leave the alignments out.")
        return pad_features([protein_features(s, msa) for s, msa in zip(sequences, alignments, strict=True)])

    # Loading

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the trunk; the language model and the norms may have another."""
        return self.parcae.out_proj.weight.dtype

    def loaded_dtype(self, name: str, dtype: mx.Dtype) -> mx.Dtype:
        """Return the dtype of a parameter if the model is loaded in `dtype`: norms stay float32."""
        return mx.float32 if any(part in name for part in FLOAT32) else dtype

    def to(self, *args: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
        """Cast the parameters in place, except those that stay float32; see `MLXPreTrainedModel.to`."""
        super().to(*args, dtype=dtype, device=device, **kwargs)
        self._cast(lambda name: self.loaded_dtype(name, self.dtype))
        return self

    @classmethod
    def checked_config(cls, config: PreTrainedConfig) -> MLXEsmFold2Config:
        """Return the config as an `MLXEsmFold2Config`, checked by `check_config`."""
        ours = as_mlx_config(config)
        check_config(ours)
        return ours

    @classmethod
    def language_config(cls, config: Any) -> Any:
        """Return the config of ESMC."""
        return config.esmc_config

    @classmethod
    def complete_checkpoint(
        cls, config: Any, arrays: dict[str, mx.array], source: str, hub: Mapping[str, Any]
    ) -> dict[str, mx.array]:
        """Return the arrays with ESMC's, from the repository that the config names, if the checkpoint lacks them.

        Biohub's packed arrays are split; see `names.unpacked`.

        Raises:
            CheckpointError: no repository is named, or it does not hold an ESMC.
            OSError: the repository was not found.
        """
        arrays = unpacked(arrays, source)
        if any(key.startswith("esmc.") for key in arrays):
            return arrays
        place = getattr(config, "esmc_id", None)
        if not place:
            raise CheckpointError(
                f"{source} holds no ESMC language model, and its config names no repository for one (esmc_id). Pass "
                'esmc_id="biohub/ESMC-6B" to from_pretrained.'
            )
        where = {name: value for name, value in hub.items() if name not in ("revision", "force_download")}
        where["revision"] = commit_of(place, **where)
        try:
            fields = read_config(place, **where)
            files = checkpoint_files(place, **where)
        except OSError as error:
            raise OSError(
                f"{shown_name(source)} needs the language model {place} (esmc_id in its config), which was not found: "
                f"{error}"
            ) from error
        stem = MLXEsmcConfig.from_dict(fields)
        expected = config.esmc_config
        sizes = [(c.hidden_size, c.num_hidden_layers) for c in (expected, stem)]
        if sizes[0] != sizes[1]:
            raise CheckpointError(
                f"{source} needs an ESMC with {sizes[0][1]} layers of width {sizes[0][0]}, but {place} has "
                f"{sizes[1][1]} of width {sizes[1][0]}."
            )
        config.esmc_config = stem
        if block := getattr(stem, "quantization", None):
            config.quantization = prefixed_block(block, "esmc")
        prefix = f"{MLXEsmcForMaskedLM.base_model_prefix}."
        return arrays | {
            f"esmc.{key.removeprefix(prefix)}": array
            for key, array in load_files(files).items()
            if not key.startswith("lm_head.")
        }


# Proteins of a batch, and samples


def lengths(mask: mx.array) -> list[int]:
    """Return the length of each row of a mask [B, L] without the padding on the right."""
    return [int(np.flatnonzero(row).max()) + 1 for row in np.array(mask)]


def protein_at(features: Mapping[str, mx.array], row: int) -> dict[str, mx.array]:
    """Return the features of one protein of a batch, without padding, with batch 1."""
    (tokens,), (atoms,) = (lengths(features[name][row : row + 1]) for name in ("attention_mask", "atom_attention_mask"))
    one = {}
    for name, array in features.items():
        array = array[row : row + 1]
        if name in ATOM_FEATURES:
            one[name] = array[:, :atoms]
        elif name in MSA_FEATURES:
            one[name] = array[:, :, :tokens]
        elif name == "token_bonds":
            one[name] = array[:, :tokens, :tokens]
        else:
            one[name] = array[:, :tokens]
    return one


def groups(samples: int, size: int) -> list[range]:
    """Return the numbers of the samples in groups of at most `size`."""
    return [range(first, min(first + size, samples)) for first in range(0, samples, size)]


def joined(results: Sequence[Mapping[str, mx.array]], L: int, A: int) -> dict[str, mx.array]:
    """Return the results of proteins as one batch, padded with zeros to L tokens and A atoms."""
    pairs = ("pae_logits", "pae", "pde_logits", "pde")
    atoms = ("sample_atom_coords", "plddt_logits", "plddt_per_atom", "resolved_logits")
    sizes = dict.fromkeys(pairs, {1: L, 2: L}) | dict.fromkeys(atoms, {1: A}) | {"plddt": {1: L}, "plddt_ca": {1: L}}
    return {name: mx.concatenate([padded_to(x[name], sizes.get(name, {})) for x in results]) for name in results[0]}


def padded_to(x: mx.array, sizes: Mapping[int, int]) -> mx.array:
    """Return `x` with zeros on the right, so that each axis of `sizes` has its size."""
    widths = [(0, sizes.get(axis, n) - n) for axis, n in enumerate(x.shape)]
    return mx.pad(x, widths) if any(after for _, after in widths) else x


def best_sample(output: MLXEsmFold2Output, first: int = 0, stop: int | None = None) -> int:
    """Return the number of the sample with the highest confidence: ipTM for complexes, pTM for single chains.

    Args:
        output: result of `fold`.
        first: the first sample to compare; those of protein b begin at b · S.
        stop: the sample after the last one; None for all.
    """
    samples = slice(first, stop)
    iptm, ptm = (np.array(x[samples]) for x in (output.iptm, output.ptm))  # type: ignore[index]
    return first + int(np.argmax(iptm if (iptm > 0).any() else ptm))
