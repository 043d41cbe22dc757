"""Predicting structures of proteins with ESMFold."""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import mlx.core as mx
import numpy as np

from mlx_esm_hf.checks import MOST_RECYCLES, check_choices, check_integer
from mlx_esm_hf.data.batches import by_length
from mlx_esm_hf.data.proteins import Report, tokens
from mlx_esm_hf.data.source import Proteins, ProteinSource
from mlx_esm_hf.demo import shown_name
from mlx_esm_hf.dtypes import as_dtype
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.jobs import structures
from mlx_esm_hf.jobs.protein_job import MemoryLimit, ProteinItems, load_checked, run_job
from mlx_esm_hf.jobs.protein_model import (
    SHARED,
    advice,
    agreed,
    check_loading,
    damage,
    known_settings_of,
    settings_of,
)
from mlx_esm_hf.models.esmfold.protein import encode_sequence
from mlx_esm_hf.models.esmfold.residue_constants import ATOM37, RESTYPES, RESTYPES_WITH_X
from mlx_esm_hf.ops.pairs import ELEMENTS_AT_A_TIME
from mlx_esm_hf.runs.job import (
    Arrays,
    Files,
    Item,
    Job,
    OnProgress,
    Progress,
    Result,
    as_on_progress,
    no_files,
    no_progress,
)
from mlx_esm_hf.runs.outputs import check_library, check_outputs, earlier_settings
from mlx_esm_hf.runs.run import Run, WriteRun
from mlx_esm_hf.runtime.costs import costs
from mlx_esm_hf.runtime.device import use_device

if TYPE_CHECKING:  # these imports take seconds, and torch with them: `fold` checks its arguments first
    from mlx_esm_hf.models.esmfold.modeling_esmfold import MLXEsmForProteinFolding

LINKER = "G" * 25  # between two chains, as in fair-esm
PAIR_STATES = 8  # maximum copies of the pair states in memory at a time

Make = Callable[[Result], bytes]  # makes the bytes of a file from a result

STRUCTURES: dict[str, Make] = {"pdb": structures.pdb, "cif": structures.mmcif}
CONFIDENCE: dict[str, Make] = {"_pae.json": structures.aligned_error_json, ".npz": structures.confidence_npz}
PICTURES: dict[str, Make] = {"_plddt.png": structures.plddt_picture, "_pae.png": structures.aligned_error_picture}


@overload
def fold(
    proteins: Proteins, model: str | os.PathLike[str] | MLXEsmForProteinFolding, output: None = None, **options: Any
) -> Iterator[Result]: ...


@overload
def fold(
    proteins: Proteins,
    model: str | os.PathLike[str] | MLXEsmForProteinFolding,
    output: str | os.PathLike[str],
    **options: Any,
) -> Report: ...


def fold(
    proteins: Proteins,
    model: str | os.PathLike[str] | MLXEsmForProteinFolding,
    output: str | os.PathLike[str] | None = None,
    *,
    formats: Sequence[str] = ("pdb", "cif"),
    pictures: bool = False,
    num_recycles: int | None = None,
    batch_tokens: int | None = None,
    strict: bool = False,
    progress: OnProgress | bool = no_progress,
    **loading: Any,
) -> Iterator[Result] | Report:
    """Predict the structures of proteins, with confidence scores.

    A protein that does not fit into free memory is left out.

    Args:
        proteins: see `read_proteins`. `:` separates the chains of a protein.
        model: a Hub repository, a folder, or a loaded model.
        output: a folder, or the `.pdb` or `.cif` file of a single protein; None to stream the results. A folder
            contains, for each protein, its structure in each format, `_pae.json` (the predicted aligned error in
            AlphaFold DB's layout) and `.npz` (see `structures.confidence_npz`); a table of all proteins, `index.csv`;
            and shards with the arrays below.
        formats: formats of the structures in a folder: "pdb", "cif" or both.
        pictures: also draw pLDDT along the chains, `_plddt.png`, and the predicted aligned error, `_pae.png`.
        num_recycles: how often the trunk runs again after its first pass; None for the number in the model's config.
        batch_tokens: maximum residues folded together, linkers and padding included, if they fit into memory;
            None for 1,024 on a GPU and 256 on a CPU.
        strict: raise an error for a bad record instead of leaving it out.
        progress: called after each step and each pass; True shows a progress bar.
        loading: `revision`, `dtype`, `device` and other options of `from_pretrained`.

    Returns:
        Without an output, an iterator over results; `structures.pdb(result)` and `structures.mmcif(result)` return the
        bytes of a file. The `arrays` of a result, for L residues without linkers, are `aatype` [L] in AlphaFold's
        order, `chain_index` [L], `positions` [L, 37, 3] of the atoms in Å (zero for atoms that do not exist), `plddt`
        [L, 37] from 0 to 100, `predicted_aligned_error` [L, L] in Å, and `mean_plddt` of all atoms, `ptm`, `recycles`
        and `seconds`, [1] each. With an output, a report of what was changed and left out.

    Raises:
        UserError: an option has an unknown value, the proteins cannot be read, or the output cannot be written.

    Example:
        >>> for result in fold(["MKTAYIAKQR:GSHM"], "facebook/esmfold_v1"):
        ...     result.arrays["positions"].shape, result.arrays["ptm"]
    """
    if num_recycles is not None:
        check_integer("num_recycles", num_recycles, 0, MOST_RECYCLES)
    check_loading(batch_tokens=batch_tokens, **loading)
    source = ProteinSource.open(proteins, chains=True)
    check_outputs(output, FORMATS)
    suffix = None if output is None else Path(output).suffix
    makers = files_in_folder(suffix, formats, pictures)
    if suffix and len(source.peek(2)) > 1:
        raise UserError(SEVERAL)
    folding = as_folding_model(model, num_recycles, loading)

    on_progress = as_on_progress(progress)

    def check(ids: np.ndarray) -> None:
        refuse_unknown(ids)
        if suffix == ".pdb" or ".pdb" in makers:
            structures.refuse_for_pdb(*ids.T)

    def compute(items: Sequence[Item]) -> list[Arrays]:
        limit.confirm(items)
        return predictions(folding, items, on_progress)

    def files(item: Item) -> Files:
        return {f"{item.name}{ending}": make for ending, make in makers.items()}

    has_files = bool(makers)
    items = ProteinItems(
        source, folding, result_bytes, output, work=pairs, check=check, has_files=has_files, strict=strict
    )
    settings = {"num_recycles": folding.recycles, "files": list(makers), "aligned": source.aligned}
    load_checked(folding, "fold", settings, items, output, progress)
    limit = MemoryLimit(output, lambda ids: folding.bytes_needed(folding.linked_length(ids)))
    wanted = batch_tokens or earlier_settings(output).get("batch_tokens", 0)
    folding.batch_tokens = agreed(folding.most_tokens(limit.bytes, wanted), wanted)
    items.add_check(limit.check)
    settings = folding.settings | settings | {"memory": limit.mebibytes}
    job = Job(
        "fold",
        settings,
        items,
        compute,
        folding.chunk_work,
        files=files if has_files else no_files,
        columns=columns if has_files else None,
        cause=folding.cause,
    )
    return run_job(job, items, output, FORMATS, on_progress)


def files_in_folder(suffix: str | None, formats: Sequence[str], pictures: bool) -> dict[str, Make]:
    """Return {suffix of a file: function that makes it} for the files of each protein in a folder.

    Args:
        suffix: suffix of the output, "" for a folder; None for no output.
        formats: formats of the structures.
        pictures: whether to draw pictures.

    Raises:
        UserError: an unknown format, a library that is not installed, or pictures without a folder.
    """
    check_choices("formats", formats, STRUCTURES)
    if suffix != "":
        if pictures:
            raise UserError("Pictures are written into a folder. Pass a name without a suffix as output.")
        return {}
    makers = {f".{name}": STRUCTURES[name] for name in STRUCTURES if name in formats} | CONFIDENCE
    makers |= PICTURES if pictures else {}
    for ending in makers:
        check_library(f"protein{ending}")
    return makers


SEVERAL = "A file contains one structure, but there are several proteins. Pass a name without a suffix for a folder."


def refuse_unknown(ids: np.ndarray) -> None:
    """Refuse a protein without atoms.

    Raises:
        UserError: none of its residues is one of the 20 standard ones.
    """
    if (ids[:, 0] == len(RESTYPES)).all():
        raise UserError("has none of the 20 standard residues, and other residues have no atoms")


def pairs(length: int) -> int:
    """Return the number of residue pairs, to which the time and memory of folding are proportional."""
    return length**2


def result_bytes(residues: int) -> int:
    """Return an upper bound of the bytes of a result."""
    return 4 * residues * (residues + 4 * len(ATOM37) + 2) + 64


def columns(result: Result) -> dict[str, Any]:
    """Return the columns of a protein in `index.csv`."""
    mean_plddt, ptm, recycles, seconds = (
        result.arrays[name].item() for name in ("mean_plddt", "ptm", "recycles", "seconds")
    )
    return {
        "files": result.name,
        "chains": int(result.arrays["chain_index"].max()) + 1,
        "mean_plddt": f"{mean_plddt:.2f}",
        "ptm": f"{ptm:.3f}",
        "recycles": recycles,
        "seconds": f"{seconds:.2f}",
    }


def write_structure(make: Make) -> WriteRun:
    """Return a function that writes the only structure of a run."""

    def write(path: Path, run: Run) -> None:
        results = list(islice(run.results(), 2))
        if len(results) > 1:
            raise UserError(SEVERAL)
        path.write_bytes(make(results[0]))

    return write


FORMATS: dict[str, WriteRun | None] = {
    "": None,
    ".pdb": write_structure(structures.pdb),
    ".cif": write_structure(structures.mmcif),
}


@dataclass
class FoldingModel:
    """A folding model and its batching. The ids of a protein are [residues, 2]: residue and chain.

    Args:
        network: the model, or its checkpoint until `load` loads the weights.
        recycles: how often the trunk runs again after its first pass.
        name: where the model is from, for manifests and messages.
        revision: its commit, for manifests.
        batch_tokens: maximum residues of a batch, linkers and padding included.
        options: arguments of `MLXEsmForProteinFolding.from_pretrained` for loading the weights.
    """

    network: Any
    recycles: int
    name: str = ""
    revision: str | None = None
    batch_tokens: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> None:
        """Load the weights, unless they have been loaded."""
        if hasattr(self.network, "model_class"):
            self.network = self.network.load(**self.options)

    @property
    def known_settings(self) -> dict[str, Any]:
        """Those of `settings` that do not depend on the weights."""
        return known_settings_of(self)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that results depend on, for the manifest of a run."""
        return settings_of(self)

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

    def predict(self, proteins: Sequence[np.ndarray]) -> list[Arrays]:
        """Fold proteins, given by their ids, in one batch."""
        from mlx_esm_hf.models.esmfold.modeling_esmfold import atom14_to_atom37

        begin = time.perf_counter()
        output: Any = self.network.infer(
            [sequence_of(ids) for ids in proteins], num_recycles=self.recycles, chain_linker=LINKER
        )
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
                    "recycles": np.array([self.recycles], np.int32),
                    "seconds": np.array([seconds * len(ids) / residues], np.float32),
                }
            )
        return results


def sequence_of(ids: np.ndarray) -> str:
    """Return the letters of a protein's residues, with `:` between its chains."""
    chains: list[str] = [""] * (int(ids[-1, 1]) + 1)
    for residue, chain in ids:
        chains[chain] += RESTYPES_WITH_X[residue]
    return ":".join(chains)


def as_folding_model(
    model: str | os.PathLike[str] | MLXEsmForProteinFolding, num_recycles: int | None, loading: dict[str, Any]
) -> FoldingModel:
    """Return a folding model. The weights of a repository or folder are not loaded yet.

    Args:
        model: a Hub repository, a folder, or a loaded model.
        num_recycles: see `fold`.
        loading: `device`, and options of `from_pretrained`.

    Raises:
        TypeError: loading options were given for a model that is already loaded.
    """
    from mlx_esm_hf.models.auto import open_checkpoint
    from mlx_esm_hf.models.esmfold.modeling_esmfold import MLXEsmForProteinFolding, refuse_float16

    if isinstance(model, MLXEsmForProteinFolding):
        if loading:
            raise TypeError(f"{', '.join(loading)}: options for loading a model, but the model is already loaded.")
        return FoldingModel(model, recycles_of(model.config, num_recycles), str(model.config.name_or_path))
    use_device(loading.get("device"))
    refuse_float16(as_dtype(loading.get("dtype")))
    hub = {name: loading[name] for name in SHARED if name in loading}
    options = {name: value for name, value in loading.items() if name not in (*SHARED, "device")}
    checkpoint = open_checkpoint(MLXEsmForProteinFolding, os.fspath(model), **hub)
    recycles = recycles_of(checkpoint.config, num_recycles)
    revision = checkpoint.commit.get("revision", loading.get("revision"))
    return FoldingModel(checkpoint, recycles, shown_name(model), revision, options=options)


def recycles_of(config: Any, num_recycles: int | None) -> int:
    """Return how often the trunk runs again after its first pass; by default as often as the config says."""
    recycles = config.esmfold_config.trunk.max_recycles - 1 if num_recycles is None else num_recycles
    check_integer("num_recycles", recycles, 0, MOST_RECYCLES)
    return recycles


def predictions(model: FoldingModel, items: Sequence[Item], progress: OnProgress) -> list[Arrays]:
    """Return the arrays of items, folded in batches of similar length; progress names the batch at each pass."""
    results: list[Arrays] = [{} for _ in items]
    lengths = [model.linked_length(item.content) for item in items]
    launch = costs().fold_launch_pairs
    for rows in by_length(lengths, model.batch_tokens, lambda length: length**2 / launch):
        first = items[rows[0]]
        others = f" and {len(rows) - 1} more" if len(rows) > 1 else ""

        def tell(number: int, passes: int, what: str = f"{first.id[:40]} ({first.length} residues){others}") -> None:
            progress(Progress(0, 0, None, f"{what}, pass {number} of {passes}"))

        model.network.trunk.on_pass = tell
        try:
            folded = model.predict([items[row].content for row in rows])
        finally:
            model.network.trunk.on_pass = None
        for row, arrays in zip(rows, folded, strict=True):
            results[row] = arrays
    return results
