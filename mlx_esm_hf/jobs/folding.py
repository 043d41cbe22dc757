"""Folding models, as the job `fold` uses them: ESMFold and what it shares with ESMFold2."""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mlx_esm_hf.checks import MOST_RECYCLES, check_integer
from mlx_esm_hf.data.batches import by_length
from mlx_esm_hf.data.proteins import tokens
from mlx_esm_hf.demo import shown_name
from mlx_esm_hf.dtypes import as_dtype
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.jobs.protein_job import ProteinItems
from mlx_esm_hf.jobs.protein_model import SHARED, advice, damage, known_settings_of, settings_of
from mlx_esm_hf.models.esmfold.protein import encode_sequence
from mlx_esm_hf.models.esmfold.residue_constants import ATOM37, RESTYPES, RESTYPES_WITH_X
from mlx_esm_hf.ops.pairs import ELEMENTS_AT_A_TIME
from mlx_esm_hf.runs.job import Arrays, Item, Result
from mlx_esm_hf.runtime.costs import costs
from mlx_esm_hf.runtime.device import use_device

LINKER = "G" * 25  # between two chains, as in fair-esm
PAIR_STATES = 8  # maximum copies of the pair states in memory at a time

Tell = Callable[[str], None]  # is called with what is computed next


def pairs(length: int) -> int:
    """Return the number of residue pairs, to which the time and memory of folding are proportional."""
    return length**2


@dataclass
class FoldingModel:
    """A folding model and its batching. The ids of a protein are [residues, 2]: residue and chain.

    Args:
        network: the model, or its checkpoint until `load` loads the weights.
        choices: options of `fold` that only this kind of model has; None leaves the choice to the model.
        name: where the model is from, for manifests and messages.
        revision: its commit, for manifests.
        batch_tokens: maximum residues of a batch, linkers and padding included.
        options: arguments of `from_pretrained` for loading the weights.
    """

    network: Any
    choices: dict[str, Any]
    name: str = ""
    revision: str | None = None
    batch_tokens: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    own_choices: ClassVar[tuple[str, ...]] = ()  # names of the options that only this kind of model has

    def __post_init__(self) -> None:
        self.choose()

    def choose(self) -> None:
        """Check the choices, and replace None by what the model's config says."""
        raise NotImplementedError

    def load(self) -> None:
        """Load the weights, unless they have been loaded."""
        if hasattr(self.network, "model_class"):
            self.network = self.network.load(**self.options)

    @property
    def known_settings(self) -> dict[str, Any]:
        """Those of `settings` that do not depend on the weights."""
        return known_settings_of(self) | self.choices

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that results depend on, for the manifest of a run."""
        return settings_of(self) | self.choices

    @property
    def chunk_work(self) -> int:
        """Maximum work of a chunk: one protein of `batch_tokens` residues. It bounds what a kill can lose."""
        return pairs(self.batch_tokens)

    def refuse_long(self, length: int) -> None:
        """Accept any length: positions are rotary and relative, so only memory limits it."""

    def encode(self, sequence: str) -> np.ndarray:
        """Return the ids [residues, 2] of a cleaned sequence.

        Raises:
            UserError: the sequence contains a special token.
        """
        if special := [token for token in tokens(sequence) if len(token) > 1]:
            raise UserError(f"has {special[0]}, but only residues can be folded")
        aatype, _, chain_index, _ = encode_sequence(sequence, None, None)
        return np.stack([aatype, chain_index], axis=1)

    def num_residues(self, ids: np.ndarray) -> int:
        """Return the number of residues, without linkers."""
        return len(ids)

    def window_tokens(self, ids: np.ndarray) -> list[int]:
        """Return the residues of the only window, which is the whole protein with its linkers."""
        return [self.linked_length(ids)]

    def linked_length(self, ids: np.ndarray) -> int:
        """Return the number of residues of a protein with its linkers."""
        return len(ids)

    def bytes_needed(self, length: int) -> int:
        """Return an upper bound of the bytes that folding a number of residues needs."""
        raise NotImplementedError

    def result_bytes(self, residues: int) -> int:
        """Return an upper bound of the bytes of a result."""
        return 4 * residues * (residues + 4 * len(ATOM37) + 2) + 64

    def most_tokens(self, free: int, wanted: int) -> int:
        """Return the residues of a batch.

        Args:
            free: bytes of memory that a batch may need.
            wanted: residues of a batch if they fit; 0 for as many as suit the device.
        """
        wanted = wanted or costs().fold_batch_tokens
        return max(1, bisect_right(range(wanted + 1), free, key=self.bytes_needed) - 1)

    def cause(self, ids: np.ndarray) -> str:
        """Return why the results of a protein, given by its ids, are NaN or infinite, and what to do."""
        return damage(self.network) or advice(self.network.dtype)

    def prepare(self, items: ProteinItems, tell: Tell) -> None:
        """Do what precedes the first batch; see `ESMFold2`."""

    def batches(self, items: Sequence[Item]) -> Iterable[Sequence[int]]:
        """Return the indices of the items to fold together."""
        return [[index] for index in range(len(items))]

    def predict(self, items: Sequence[Item], tell: Tell) -> list[Arrays]:
        """Fold proteins in one batch."""
        raise NotImplementedError

    def columns(self, result: Result) -> dict[str, Any]:
        """Return the columns of a protein in `index.csv` between its pTM and its seconds."""
        raise NotImplementedError


class ESMFold(FoldingModel):
    """ESMFold: chains are joined by linkers, and proteins of similar length are folded together."""

    own_choices = ("num_recycles",)

    def choose(self) -> None:
        """Check the number of recycles; by default it is that of the config."""
        recycles = self.choices["num_recycles"]
        if recycles is None:
            recycles = self.network.config.esmfold_config.trunk.max_recycles - 1
        check_integer("num_recycles", recycles, 0, MOST_RECYCLES)
        self.choices = {"num_recycles": recycles}

    def linked_length(self, ids: np.ndarray) -> int:
        """Return the number of residues of a protein with its linkers."""
        return len(ids) + int(ids[-1, 1]) * len(LINKER)

    def bytes_needed(self, length: int) -> int:
        """Return an upper bound of the bytes that folding a number of residues needs.

        It counts the pair states several times, the logits of distances and errors, the residue states, the weights of
        a layer of the language model, and the scratch memory of the pair operations.
        """
        from mlx_esm_hf.models.esmfold.modeling_esmfold import DISTOGRAM_BINS

        config = self.network.config
        trunk = config.esmfold_config.trunk
        pair = PAIR_STATES * trunk.pairwise_state_dim + 4 * DISTOGRAM_BINS
        residue = 4 * (config.intermediate_size + 4 * trunk.sequence_state_dim)
        layers = 2 * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size)  # language model
        return 4 * (pair * length**2 + residue * length + layers + 8 * ELEMENTS_AT_A_TIME)

    def batches(self, items: Sequence[Item]) -> Iterable[Sequence[int]]:
        """Return the indices of the items to fold together: those of similar length."""
        launch = costs().fold_launch_pairs
        lengths = [self.linked_length(item.content) for item in items]
        return by_length(lengths, self.batch_tokens, lambda length: length**2 / launch)

    def predict(self, items: Sequence[Item], tell: Tell) -> list[Arrays]:
        """Fold proteins in one batch."""
        from mlx_esm_hf.models.esmfold.modeling_esmfold import atom14_to_atom37

        begin = time.perf_counter()
        proteins = [item.content for item in items]
        self.network.trunk.on_pass = lambda number, passes: tell(f"pass {number} of {passes}")
        try:
            output: Any = self.network.infer(
                [sequence_of(ids) for ids in proteins], num_recycles=self.choices["num_recycles"], chain_linker=LINKER
            )
        finally:
            self.network.trunk.on_pass = None
        positions = np.array(atom14_to_atom37(output.positions[-1], output))
        plddt, error, mean_plddt, ptm = (
            np.array(array.astype(mx.float32))
            for array in (output.plddt, output.predicted_aligned_error, output.mean_plddt, output.ptm)
        )
        seconds = time.perf_counter() - begin
        residues = sum(map(len, proteins))
        results = []
        for row, ids in enumerate(proteins):
            places = np.arange(len(ids)) + ids[:, 1] * len(LINKER)  # skips linkers and padding
            results.append(
                {
                    "aatype": ids[:, 0],
                    "chain_index": ids[:, 1],
                    "positions": positions[row, places],
                    "plddt": 100 * plddt[row, places],
                    "predicted_aligned_error": error[row][np.ix_(places, places)],
                    "mean_plddt": 100 * mean_plddt[row : row + 1],
                    "ptm": ptm[row : row + 1],
                    "recycles": np.array([self.choices["num_recycles"]], np.int32),
                    "seconds": np.array([seconds * len(ids) / residues], np.float32),
                }
            )
        return results

    def columns(self, result: Result) -> dict[str, Any]:
        """Return the columns of a protein in `index.csv` between its pTM and its seconds."""
        return {"recycles": result.arrays["recycles"].item()}


def sequence_of(ids: np.ndarray) -> str:
    """Return the letters of a protein's residues, with `:` between its chains."""
    chains: list[str] = [""] * (int(ids[-1, 1]) + 1)
    for residue, chain in ids:
        chains[chain] += RESTYPES_WITH_X[residue]
    return ":".join(chains)


def refuse_unknown(ids: np.ndarray) -> None:
    """Refuse a protein without atoms.

    Raises:
        UserError: none of its residues is one of the 20 standard ones.
    """
    if (ids[:, 0] == len(RESTYPES)).all():
        raise UserError("has none of the 20 standard residues, and other residues have no atoms")


def as_folding_model(model: Any, choices: dict[str, Any], loading: dict[str, Any]) -> FoldingModel:
    """Return a folding model. The weights of a repository or folder are not loaded yet.

    Args:
        model: a Hub repository, a folder, or a loaded model.
        choices: options of `fold` that only one kind of model has; None for those that were not given.
        loading: `device`, and options of `from_pretrained`.

    Raises:
        TypeError: loading options were given for a model that is already loaded.
        UserError: the model does not fold, or an option is for another kind of model.
    """
    from mlx_esm_hf.jobs.folding2 import ESMFold2
    from mlx_esm_hf.models.auto import MLXAutoModelForFolding, open_checkpoint
    from mlx_esm_hf.models.esmfold.modeling_esmfold import MLXEsmForProteinFolding, refuse_float16
    from mlx_esm_hf.models.esmfold2.modeling_esmfold2 import MLXEsmFold2Model

    kinds: dict[Any, type[FoldingModel]] = {MLXEsmForProteinFolding: ESMFold, MLXEsmFold2Model: ESMFold2}
    if type(model) in kinds:
        if loading:
            raise TypeError(f"{', '.join(loading)}: options for loading a model, but the model is already loaded.")
        kind = kinds[type(model)]
        return kind(model, own_choices(kind, choices), str(model.config.name_or_path))
    use_device(loading.get("device"))
    hub = {name: loading[name] for name in SHARED if name in loading}
    options = {name: value for name, value in loading.items() if name not in (*SHARED, "device")}
    checkpoint = open_checkpoint(MLXAutoModelForFolding, os.fspath(model), **hub)
    kind = kinds[checkpoint.model_class]
    if kind is ESMFold:
        refuse_float16(as_dtype(loading.get("dtype")))
    revision = checkpoint.commit.get("revision", loading.get("revision"))
    return kind(checkpoint, own_choices(kind, choices), shown_name(model), revision, options=options)


def own_choices(kind: type[FoldingModel], choices: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a kind of model has.

    Raises:
        UserError: an option of another kind was given.
    """
    for name, value in choices.items():
        if name not in kind.own_choices and value not in (None, False):
            known = ", ".join(kind.own_choices)
            raise UserError(f"{name} is not an option of {kind.__name__} models; they have {known}.")
    return {name: choices[name] for name in kind.own_choices}
