"""Structures of proteins, by ESMFold."""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_esm_hf.data.batches import by_length
from mlx_esm_hf.data.proteins import Report, Source, is_stream, read_proteins, tokens
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.jobs import structures
from mlx_esm_hf.jobs.protein_job import ProteinJob, Room, WriteRun
from mlx_esm_hf.jobs.protein_model import agreed, same_commit, settings_of
from mlx_esm_hf.models.esmfold.modeling_esmfold import (
    DISTOGRAM_BINS,
    MLXEsmForProteinFolding,
    atom14_to_atom37,
)
from mlx_esm_hf.models.esmfold.protein import encode_sequence
from mlx_esm_hf.models.esmfold.residue_constants import ATOM37, RESTYPES, RESTYPES_WITH_X
from mlx_esm_hf.ops.pairs import NUMBERS_AT_A_TIME
from mlx_esm_hf.runs.job import Arrays, Files, Item, OnProgress, Progress, Result, no_files, no_progress
from mlx_esm_hf.runs.outputs import check_library, check_outputs, earlier_settings
from mlx_esm_hf.runs.run import Run
from mlx_esm_hf.runtime.costs import costs
from mlx_esm_hf.runtime.device import use_device

LINKER = "G" * 25  # between two chains, as fair-esm has it
PAIR_STATES = 8  # that are in memory at a time, at most

Make = Callable[[Result], bytes]

STRUCTURES: dict[str, Make] = {"pdb": structures.pdb, "cif": structures.mmcif}
CONFIDENCE: dict[str, Make] = {"_pae.json": structures.aligned_error_json, ".npz": structures.confidence_npz}
PICTURES: dict[str, Make] = {"_plddt.png": structures.plddt_picture, "_pae.png": structures.aligned_error_picture}


def fold(
    proteins: Source,
    model: str | os.PathLike[str] | MLXEsmForProteinFolding,
    output: str | os.PathLike[str] | None = None,
    *,
    formats: Sequence[str] = ("pdb", "cif"),
    pictures: bool = False,
    num_recycles: int | None = None,
    batch_tokens: int | None = None,
    strict: bool = False,
    progress: OnProgress = no_progress,
    **loading: Any,
) -> Iterator[Result] | Report:
    """The structures of proteins, with the model's confidence in them.

    Args:
        proteins: see `read_proteins`; `:` stands between the chains of a protein.
        model: a Hub repository, a folder, or a model that is loaded.
        output: a folder, or the `.pdb` or `.cif` file of a single protein. A folder has for each protein its structure
            in each of the formats, `_pae.json` (the predicted aligned error in AlphaFold DB's layout) and `.npz` (see
            `structures.confidence_npz`); a table of all, `index.csv`; and shards with the arrays below.
        formats: of the structures in a folder: "pdb", "cif", or both.
        pictures: draw pLDDT along the chains, `_plddt.png`, and the predicted aligned error, `_pae.png`, as well.
        num_recycles: the trunk runs once more than this; by default as often as the model's config says.
        batch_tokens: most residues, with linkers and padding, that are folded together, if so many fit into memory; by
            default 1,024 on a GPU and 256 on a CPU.
        loading: `revision`, `dtype`, `device` and the others of `from_pretrained`.

    A protein that would not fit into the memory that is free is left out, as others that cannot be read.

    Returns:
        Without an output, an iterator over results; `structures.pdb(result)` and `structures.mmcif(result)` make files
        of one. Its `arrays`, for L residues without linkers, are `aatype` [L] in AlphaFold's order, `chain_index` [L],
        `positions` [L, 37, 3] of the atoms in Å (zeros where there is none), `plddt` [L, 37], 0 to 100,
        `predicted_aligned_error` [L, L] in Å, and a number each [1]: `mean_plddt` of all atoms, `ptm`, `recycles`,
        `seconds`. With an output, a report of what was changed and left out.

    Example:
        >>> for result in fold(["MKTAYIAKQR:GSHM"], "facebook/esmfold_v1"):
        ...     result.arrays["positions"].shape, result.arrays["ptm"]
    """
    if batch_tokens is not None and batch_tokens < 1:
        raise UserError(f"batch_tokens={batch_tokens}: at least one is needed.")
    check_outputs(output, FORMATS)
    suffix = None if output is None else Path(output).suffix
    makers = files_in_folder(suffix, formats, pictures)
    if suffix:
        proteins = single(proteins)
    folding = as_folding_model(model, num_recycles, loading)
    room = Room(output, lambda ids: folding.bytes_needed(folding.linked_length(ids)))
    wanted = batch_tokens or earlier_settings(output).get("batch_tokens", 0)
    folding.batch_tokens = agreed(folding.most_tokens(room.bytes, wanted), wanted)

    def check(ids: np.ndarray) -> None:
        refuse_unknown(ids)
        room.check(ids)
        if suffix == ".pdb" or ".pdb" in makers:
            structures.refuse_for_pdb(*ids.T)

    def compute(items: Sequence[Item]) -> list[Arrays]:
        room.confirm(items)
        return predictions(folding, items, progress)

    def files(item: Item) -> Files:
        return {f"{item.name}{ending}": make for ending, make in makers.items()}

    job = ProteinJob(
        "fold",
        folding,
        {"num_recycles": folding.recycles, "files": list(makers), "memory": room.mebibytes},
        compute,
        result_bytes,
        # Of a chunk the work is about that of one protein of so many residues: a kill costs no more than this.
        work=pairs,
        chunk_work=pairs(folding.batch_tokens),
        check=check,
        strict=strict,
        chains=True,
        files=files if makers else no_files,
        columns=columns if makers else None,
    )
    if output is None:
        return job.stream(proteins)
    return job.write(proteins, Path(output), FORMATS, progress)


def files_in_folder(suffix: str | None, formats: Sequence[str], pictures: bool) -> dict[str, Make]:
    """What makes the files of a protein in a folder, by the ends of their names.

    Args:
        suffix: of the output; None, there is none.

    Raises:
        ValueError: an unknown format, a library that is not installed, or pictures without a folder.
    """
    if unknown := [name for name in formats if name not in STRUCTURES]:
        raise UserError(f"formats {', '.join(unknown)}: choose from {', '.join(STRUCTURES)}.")
    if suffix != "":
        if pictures:
            raise UserError("Pictures are files in a folder: name one, without a suffix, as output.")
        return {}
    makers = {f".{name}": STRUCTURES[name] for name in STRUCTURES if name in formats} | CONFIDENCE
    makers |= PICTURES if pictures else {}
    for ending in makers:
        check_library(f"protein{ending}")
    return makers


def single(proteins: Source) -> Source:
    """The proteins, of which there is one, as far as this can be known before the work.

    Raises:
        ValueError: there are more.
    """
    if is_stream(proteins):
        return proteins
    if not isinstance(proteins, (str, os.PathLike)):
        proteins = list(proteins)
    if len(list(islice(read_proteins(proteins, chains=True), 2))) > 1:
        raise UserError(SEVERAL)
    return proteins


SEVERAL = "A file holds the structure of one protein, and there are more: name a folder, without a suffix, as output."


def refuse_unknown(ids: np.ndarray) -> None:
    """
    Raises:
        ValueError: a protein without atoms.
    """
    if (ids[:, 0] == len(RESTYPES)).all():
        raise UserError("has no residue of the twenty, and others have no atoms")


def pairs(length: int) -> int:
    """How many pairs of residues there are: what folding takes time and memory for."""
    return length**2


def result_bytes(residues: int) -> int:
    """An upper bound of the bytes of a result."""
    return 4 * residues * (residues + 4 * len(ATOM37) + 2) + 64


def columns(result: Result) -> dict[str, Any]:
    """What the table says of a protein."""
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
    """What writes the only structure of a run."""

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
    """A folding model, and how to give proteins to it. The ids of a protein are [residues, 2]: residue and chain.

    Args:
        network: the model.
        recycles: how often the trunk runs again.
        name, revision: where it is from, for manifests and messages.
        batch_tokens: most residues, with linkers and padding, of a batch.
    """

    network: MLXEsmForProteinFolding
    recycles: int
    name: str = ""
    revision: str | None = None
    batch_tokens: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """What results depend on, for the manifest of a run."""
        return settings_of(self)

    def refuse_long(self, length: int) -> None:
        """The stem has rotary positions, and the trunk relative ones: there is no end but that of the memory."""

    def encode(self, sequence: str) -> np.ndarray:
        """The ids of a cleaned sequence [residues, 2].

        Raises:
            ValueError: a special token.
        """
        if special := [token for token in tokens(sequence) if len(token) > 1]:
            raise UserError(f"has {special[0]}, and only residues can be folded")
        aatype, _, chain_index, _ = encode_sequence(sequence, None, None)
        return np.stack([aatype, chain_index], axis=1)

    def residues(self, ids: np.ndarray) -> int:
        """How many there are, without linkers."""
        return len(ids)

    def passes(self, ids: np.ndarray) -> list[int]:
        return [self.linked_length(ids)]

    def linked_length(self, ids: np.ndarray) -> int:
        """Residues of a protein with its linkers."""
        return len(ids) + int(ids[-1, 1]) * len(LINKER)

    def bytes_needed(self, length: int) -> int:
        """An upper bound of the memory that folding so many residues takes: the states of all pairs, several times, the
        logits of their distances and errors, the states of residues, and what is computed at a time."""
        config = self.network.config
        trunk = config.esmfold_config.trunk
        pair = PAIR_STATES * trunk.pairwise_state_dim + 4 * DISTOGRAM_BINS
        residue = 4 * (config.intermediate_size + 4 * trunk.sequence_state_dim)
        layers = 2 * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size)  # of the stem
        return 4 * (pair * length**2 + residue * length + layers + 8 * NUMBERS_AT_A_TIME)

    def most_tokens(self, room: int, wanted: int) -> int:
        """The residues of a batch: as many as are wanted, or 0, as suit the device, if they fit into so many bytes."""
        wanted = wanted or costs().fold_batch_tokens
        return max(1, bisect_right(range(wanted + 1), room, key=self.bytes_needed) - 1)

    def predict(self, proteins: Sequence[np.ndarray]) -> list[Arrays]:
        """Fold proteins, by their ids, together."""
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
            places = np.arange(len(ids)) + ids[:, 1] * len(LINKER)  # without linkers and padding
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
    """The letters of a protein's residues, with `:` between its chains."""
    chains: list[str] = [""] * (int(ids[-1, 1]) + 1)
    for residue, chain in ids:
        chains[chain] += RESTYPES_WITH_X[residue]
    return ":".join(chains)


def as_folding_model(
    model: str | os.PathLike[str] | MLXEsmForProteinFolding, num_recycles: int | None, loading: dict[str, Any]
) -> FoldingModel:
    """The model, loaded if it is none yet.

    Args:
        loading: `device`, and options of `from_pretrained`.

    Raises:
        TypeError: options of loading for a model that is loaded.
    """
    if isinstance(model, MLXEsmForProteinFolding):
        if loading:
            raise TypeError(f"{', '.join(loading)}: this is for loading a model, and this one is loaded already.")
        return FoldingModel(model, model.trunk.passes(num_recycles) - 1, str(model.config.name_or_path))
    use_device(loading.pop("device", None))
    revision = loading.pop("revision", None)
    network = MLXEsmForProteinFolding.from_pretrained(model, revision=revision or "main", **loading)
    recycles = network.trunk.passes(num_recycles) - 1
    return FoldingModel(network, recycles, str(model), same_commit(network).get("revision", revision))


def predictions(model: FoldingModel, items: Sequence[Item], progress: OnProgress) -> list[Arrays]:
    """The results of items, those of like length folded together; which one is told at each pass."""
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
