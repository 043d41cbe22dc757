"""Predicting structures of proteins with ESMFold or ESMFold2."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np

from mlx_esm_hf.checks import MOST_RECYCLES, MOST_SAMPLES, MOST_SEED, MOST_STEPS, check_choices, check_integer
from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.source import Proteins, ProteinSource
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.jobs import structures
from mlx_esm_hf.jobs.folding import FoldingModel, as_folding_model, pairs, refuse_unknown
from mlx_esm_hf.jobs.protein_job import MemoryLimit, ProteinItems, load_checked, run_job
from mlx_esm_hf.jobs.protein_model import agreed, check_loading
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

if TYPE_CHECKING:  # these imports take seconds, and torch with them: `fold` checks its arguments first
    from mlx_esm_hf.models.esmfold.modeling_esmfold import MLXEsmForProteinFolding
    from mlx_esm_hf.models.esmfold2.modeling_esmfold2 import MLXEsmFold2Model

    Network: TypeAlias = MLXEsmForProteinFolding | MLXEsmFold2Model

Make = Callable[[Result], bytes]  # makes the bytes of a file from a result

STRUCTURES: dict[str, Make] = {"pdb": structures.pdb, "cif": structures.mmcif}
CONFIDENCE: dict[str, Make] = {"_pae.json": structures.aligned_error_json, ".npz": structures.confidence_npz}
RANGES = {
    "num_recycles": (0, MOST_RECYCLES),
    "num_loops": (0, MOST_RECYCLES),
    "num_samples": (1, MOST_SAMPLES),
    "num_steps": (1, MOST_STEPS),
    "seed": (0, MOST_SEED),
}

PICTURES: dict[str, Make] = {"_plddt.png": structures.plddt_picture, "_pae.png": structures.aligned_error_picture}


@overload
def fold(
    proteins: Proteins, model: str | os.PathLike[str] | Network, output: None = None, **options: Any
) -> Iterator[Result]: ...


@overload
def fold(
    proteins: Proteins,
    model: str | os.PathLike[str] | Network,
    output: str | os.PathLike[str],
    **options: Any,
) -> Report: ...


def fold(
    proteins: Proteins,
    model: str | os.PathLike[str] | Network,
    output: str | os.PathLike[str] | None = None,
    *,
    formats: Sequence[str] = ("pdb", "cif"),
    pictures: bool = False,
    num_recycles: int | None = None,
    num_loops: int | None = None,
    num_samples: int | None = None,
    num_steps: int | None = None,
    seed: int | None = None,
    msa: str | os.PathLike[str] | None = None,
    free_stem: bool = False,
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
        num_recycles: for ESMFold, how often the trunk runs again after its first pass; None for the number in the
            model's config.
        num_loops: the same for ESMFold2.
        num_samples: for ESMFold2, structures to sample for each protein; the one with the highest confidence is kept
            (pTM, or ipTM for several chains). None for 1, or 5 for several chains.
        num_steps: for ESMFold2, steps of the noise schedule before its top is cut; None for the number in the config.
        seed: for ESMFold2, seed of all random numbers; None for 0. The same seed gives the same structure.
        msa: for ESMFold2, a folder with alignments in A3M format: ID.a3m for each protein, or ID_1.a3m, ID_2.a3m and so
            on for its chains, where ID is the name of the protein's files. Proteins without one are folded alone.
        free_stem: for ESMFold2, run the language model on all proteins first and then free its memory. Needs a file.
        batch_tokens: for ESMFold, maximum residues folded together, linkers and padding included, if they fit into
            memory; None for 1,024 on a GPU and 256 on a CPU. ESMFold2 folds proteins one by one.
        strict: raise an error for a bad record instead of leaving it out.
        progress: called after each step and each pass; True shows a progress bar.
        loading: `revision`, `dtype`, `device` and other options of `from_pretrained`.

    Returns:
        Without an output, an iterator over results; `structures.pdb(result)` and `structures.mmcif(result)` return the
        bytes of a file. The `arrays` of a result, for L residues without linkers, are `aatype` [L] in AlphaFold's
        order, `chain_index` [L], `positions` [L, 37, 3] of the atoms in Å (zero for atoms that do not exist), `plddt`
        [L, 37] from 0 to 100, `predicted_aligned_error` [L, L] in Å, and `mean_plddt` of all atoms, `ptm` and
        `seconds`, [1] each. ESMFold adds `recycles` [1]. ESMFold2 adds `iptm`, `sample`, `loops`, `steps` and `seed`,
        [1] each, `pair_chains_iptm` [chains, chains], and `sample_ptm` and `sample_iptm` of all samples. With an
        output, a report of what was changed and left out.

    Raises:
        UserError: an option has an unknown value, the proteins cannot be read, or the output cannot be written.

    Example:
        >>> for result in fold(["MKTAYIAKQR:GSHM"], "facebook/esmfold_v1"):
        ...     result.arrays["positions"].shape, result.arrays["ptm"]
    """
    choices: dict[str, Any] = {
        "num_recycles": num_recycles,
        "num_loops": num_loops,
        "num_samples": num_samples,
        "num_steps": num_steps,
        "seed": seed,
        "msa": msa,
        "free_stem": free_stem,
    }
    for name, (low, high) in RANGES.items():
        if choices[name] is not None:
            check_integer(name, choices[name], low, high)
    check_loading(batch_tokens=batch_tokens, **loading)
    source = ProteinSource.open(proteins, chains=True)
    check_outputs(output, FORMATS)
    suffix = None if output is None else Path(output).suffix
    makers = files_in_folder(suffix, formats, pictures)
    if suffix and len(source.peek(2)) > 1:
        raise UserError(SEVERAL)
    folding = as_folding_model(model, choices, loading)

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
        source, folding, folding.result_bytes, output, work=pairs, check=check, has_files=has_files, strict=strict
    )
    settings = {"files": list(makers), "aligned": source.aligned}
    load_checked(folding, "fold", settings, items, output, progress)
    limit = MemoryLimit(output, lambda ids: folding.bytes_needed(folding.linked_length(ids)))
    wanted = batch_tokens or earlier_settings(output).get("batch_tokens", 0)
    folding.batch_tokens = agreed(folding.most_tokens(limit.bytes, wanted), wanted)
    items.add_check(limit.check)
    settings = folding.settings | settings | {"memory": limit.mebibytes}
    folding.prepare(items, lambda what: on_progress(Progress(0, 0, None, what)))
    job = Job(
        "fold",
        settings,
        items,
        compute,
        folding.chunk_work,
        files=files if has_files else no_files,
        columns=columns_of(folding) if has_files else None,
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


def columns_of(model: FoldingModel) -> Callable[[Result], dict[str, Any]]:
    """Return a function from the result of a protein to its columns in `index.csv`."""

    def columns(result: Result) -> dict[str, Any]:
        mean_plddt, ptm, seconds = (result.arrays[name].item() for name in ("mean_plddt", "ptm", "seconds"))
        return {
            "files": result.name,
            "chains": int(result.arrays["chain_index"].max()) + 1,
            "mean_plddt": f"{mean_plddt:.2f}",
            "ptm": f"{ptm:.3f}",
            **model.columns(result),
            "seconds": f"{seconds:.2f}",
        }

    return columns


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


def predictions(model: FoldingModel, items: Sequence[Item], progress: OnProgress) -> list[Arrays]:
    """Return the arrays of items, folded in batches; progress names the batch and what is computed."""
    results: list[Arrays] = [{} for _ in items]
    for rows in model.batches(items):
        first = items[rows[0]]
        others = f" and {len(rows) - 1} more" if len(rows) > 1 else ""

        def tell(step: str, what: str = f"{first.id[:40]} ({first.length} residues){others}") -> None:
            progress(Progress(0, 0, None, f"{what}, {step}"))

        for row, arrays in zip(rows, model.predict([items[row] for row in rows], tell), strict=True):
            results[row] = arrays
    return results
