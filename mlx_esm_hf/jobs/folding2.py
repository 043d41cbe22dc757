"""ESMFold2, as the job `fold` uses it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_esm_hf.checks import check_integer
from mlx_esm_hf.errors import UserError, quoted
from mlx_esm_hf.jobs.folding import FoldingModel, Tell, sequence_of
from mlx_esm_hf.jobs.protein_job import ProteinItems
from mlx_esm_hf.models.esmfold.residue_constants import ATOM37
from mlx_esm_hf.ops.pairs import ELEMENTS_AT_A_TIME
from mlx_esm_hf.runs.ids import FileNames
from mlx_esm_hf.runs.job import Arrays, Item, Result

PAIR_STATES = 12  # maximum copies of the pair states in memory at a time
COMPLEX_SAMPLES = 5  # default for several chains, whose arrangement varies more than the fold of one
A3M = ("{}.a3m", "{}.a3m.gz", "{}.a3m.zst")


class ESMFold2(FoldingModel):
    """ESMFold2: proteins are folded one by one, so a result does not depend on the others."""

    own_choices = ("num_loops", "num_samples", "num_steps", "seed", "msa", "free_stem")

    def choose(self) -> None:
        """Check the choices, and replace None by what the model's config says."""
        config = self.network.config
        chosen = dict(self.choices)
        self.msa_folder = None if chosen["msa"] is None else Path(chosen["msa"])
        if self.msa_folder is not None:
            if not config.msa_encoder.enabled:
                raise UserError("This model has no MSA encoder: leave out --msa, or use biohub/ESMFold2.")
            chosen["msa"] = digest(self.msa_folder)
        self.frees_stem = bool(chosen.pop("free_stem"))
        self.language_states: dict[str, np.ndarray] = {}  # of each protein, if the language model is freed
        defaults = {"num_loops": config.num_loops, "num_steps": config.structure_head.inference_num_steps, "seed": 0}
        self.choices = {name: defaults.get(name) if value is None else value for name, value in chosen.items()}
        for name, least in (("num_loops", 0), ("num_samples", 1), ("num_steps", 1), ("seed", 0)):
            if self.choices[name] is not None:
                check_integer(name, self.choices[name], least)

    def samples(self, ids: np.ndarray) -> int:
        """Return the number of samples of a protein."""
        return self.choices["num_samples"] or (COMPLEX_SAMPLES if ids[-1, 1] else 1)

    def bytes_needed(self, length: int) -> int:
        """Return an upper bound of the bytes that folding a number of residues needs, without an alignment.

        It counts the pair states several times, the logits of distances and errors, the states of tokens and atoms, the
        weights of a layer of the language model, and the scratch memory of the pair operations.
        """
        config = self.network.config
        head, scores = config.structure_head, config.confidence_head
        bins = head.num_distogram_bins + 2 * (scores.num_pae_bins + scores.num_pde_bins)
        pair = PAIR_STATES * config.pairwise_hidden_size + bins
        tokens = 32 * head.diffusion_module.hidden_size + 16 * 14 * head.diffusion_module.atom_encoder.hidden_size
        stem = config.esmc_config
        layer = 4 * stem.hidden_size**2 + 3 * stem.hidden_size * stem.intermediate_size
        samples = self.choices["num_samples"] or COMPLEX_SAMPLES
        return 4 * (pair * length**2 + samples * tokens * length + layer + 12 * ELEMENTS_AT_A_TIME)

    def result_bytes(self, residues: int) -> int:
        """Return an upper bound of the bytes of a result."""
        return super().result_bytes(residues) + 4 * residues**2 + 1024

    def prepare(self, items: ProteinItems, tell: Tell) -> None:
        """Check the alignments of all proteins and, if the language model is to be freed, run it on all of them.

        Raises:
            UserError: an alignment is of another protein, or the proteins come from a stream, which cannot be read
                twice.
        """
        if self.frees_stem and not items.source.can_reread:
            raise UserError("--free-stem needs a file: the language model reads all proteins before any is folded.")
        found = 0
        if self.frees_stem or (self.msa_folder is not None and items.source.can_reread):
            for item in items:
                features = self.features(item, max_rows=1)
                found += bool(self.alignments(item))
                if self.frees_stem:
                    tell(f"language model: {item.id[:40]} ({item.length} residues)")
                    self.language_states[item.id] = np.array(self.network.language_states(features))
            if self.msa_folder is not None and not found:
                raise UserError(f"{self.msa_folder} has no alignment for any protein; expected files such as ID.a3m.")
        if self.frees_stem:
            self.network.free_stem()
            mx.clear_cache()

    def alignments(self, item: Item) -> dict[int, Path]:
        """Return {number of a chain: its alignment} of the chains of a protein that have one.

        The alignment of protein ID is ID.a3m, and those of its chains are ID_1.a3m, ID_2.a3m and so on.
        """
        if self.msa_folder is None:
            return {}
        name = item.name or FileNames().name(item.id)
        chains = int(item.content[-1, 1]) + 1
        stems = [name] if chains == 1 else [f"{name}_{number}" for number in range(1, chains + 1)]
        found = {}
        for chain, stem in enumerate(stems):
            paths = [self.msa_folder / pattern.format(stem) for pattern in A3M]
            if path := next((path for path in paths if path.is_file()), None):
                found[chain] = path
        return found

    def features(self, item: Item, max_rows: int | None = None) -> dict[str, Any]:
        """Return the features of a protein, with the first `max_rows` rows of its alignments."""
        from mlx_esm_hf.models.esmfold2.features import pad_features, protein_features, read_a3m

        sequence = sequence_of(item.content)
        paths = self.alignments(item)
        try:
            alignments = {chain: read_a3m(path, max_rows) for chain, path in paths.items()}
            msas = [alignments.get(chain) for chain in range(sequence.count(":") + 1)]
            return pad_features([protein_features(sequence, msas)])
        except UserError as error:
            raise UserError(f"{quoted(item.id)}: {error}") from error

    def predict(self, items: Sequence[Item], tell: Tell) -> list[Arrays]:
        """Fold one protein."""
        from mlx_esm_hf.models.esmfold2.modeling_esmfold2 import best_sample

        (item,) = items
        begin = time.perf_counter()
        features = self.features(item)
        states = self.language_states.get(item.id)
        self.network.on_step = tell
        try:
            output: Any = self.network.fold(
                num_diffusion_samples=self.samples(item.content),
                num_sampling_steps=self.choices["num_steps"],
                num_loops=self.choices["num_loops"],
                seed=self.choices["seed"],
                language_states=None if states is None else mx.array(states),
                **features,
            )
        finally:
            self.network.on_step = None
        best = best_sample(output)
        coords, plddt = np.array(output.sample_atom_coords[best]), np.array(output.plddt_per_atom[best])
        positions, atom_plddt = by_residue(features, coords, plddt)
        ids = item.content
        return [
            {
                "aatype": ids[:, 0],
                "chain_index": ids[:, 1],
                "positions": positions,
                "plddt": 100 * atom_plddt,
                "predicted_aligned_error": np.array(output.pae[best]),
                "mean_plddt": 100 * np.array(output.complex_plddt[best : best + 1]),
                "ptm": np.array(output.ptm[best : best + 1]),
                "iptm": np.array(output.iptm[best : best + 1]),
                "pair_chains_iptm": np.array(output.pair_chains_iptm[best]),
                "sample_ptm": np.array(output.ptm),
                "sample_iptm": np.array(output.iptm),
                "sample": np.array([best], np.int32),
                "loops": np.array([self.choices["num_loops"]], np.int32),
                "steps": np.array([self.choices["num_steps"]], np.int32),
                "seed": np.array([self.choices["seed"]], np.int64),
                "seconds": np.array([time.perf_counter() - begin], np.float32),
            }
        ]

    def columns(self, result: Result) -> dict[str, Any]:
        """Return the columns of a protein in `index.csv` between its pTM and its seconds."""
        arrays = result.arrays
        numbers = {name: arrays[name].item() for name in ("loops", "steps", "seed")}
        return {
            "iptm": f"{arrays['iptm'].item():.3f}",
            "samples": len(arrays["sample_ptm"]),
            "sample": arrays["sample"].item() + 1,
            **numbers,
        }


def by_residue(features: dict[str, Any], coords: np.ndarray, plddt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return positions [L, 37, 3] and pLDDT [L, 37] by residue and kind of atom, with 0 for atoms that do not exist.

    Args:
        features: of one protein.
        coords: [A, 3].
        plddt: [A].
    """
    from mlx_esm_hf.models.esmfold2.residues import decode_name

    token, chars, mask = (
        np.array(features[name])[0] for name in ("atom_to_token", "ref_atom_name_chars", "atom_attention_mask")
    )
    L = features["attention_mask"].shape[1]
    positions, scores = np.zeros((L, len(ATOM37), 3), np.float32), np.zeros((L, len(ATOM37)), np.float32)
    for atom in np.flatnonzero(mask):
        place = token[atom], ATOM37.index(decode_name(chars[atom]))
        positions[place], scores[place] = coords[atom], plddt[atom]
    return positions, scores


def digest(folder: Path) -> str:
    """Return a hash of the names and sizes of the alignments in a folder, for the manifest of a run.

    Raises:
        UserError: it is not a folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. --msa expects a folder of alignments, ID.a3m for each protein.")
    files = sorted(path for path in folder.iterdir() if ".a3m" in path.suffixes)
    names = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
    return hashlib.sha256(names.encode()).hexdigest()[:16]
