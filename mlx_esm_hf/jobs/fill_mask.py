"""The most probable residues at each <mask>."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from mlx_esm_hf.checks import check_integer
from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.source import Proteins, ProteinSource
from mlx_esm_hf.data.vocabulary import refuse_structures
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.jobs.protein_job import ProteinItems, load_checked, run_job
from mlx_esm_hf.jobs.protein_model import ProteinModel, as_protein_model, check_loading
from mlx_esm_hf.runs.job import Arrays, Item, Job, OnProgress, Result, no_progress
from mlx_esm_hf.runs.outputs import check_outputs
from mlx_esm_hf.runs.run import Run


@overload
def fill_mask(
    proteins: Proteins, model: str | ProteinModel, output: None = None, **options: Any
) -> Iterator[Result]: ...


@overload
def fill_mask(
    proteins: Proteins, model: str | ProteinModel, output: str | os.PathLike[str], **options: Any
) -> Report: ...


def fill_mask(
    proteins: Proteins,
    model: str | ProteinModel,
    output: str | os.PathLike[str] | None = None,
    *,
    top_k: int = 5,
    aligned: bool = False,
    structure: str | os.PathLike[str] | None = None,
    strict: bool = False,
    progress: OnProgress | bool = no_progress,
    **loading: Any,
) -> Iterator[Result] | Report:
    """Predict the most probable tokens at each <mask>, all masks in one pass, over the whole vocabulary.

    Args:
        proteins: see `read_proteins`. Proteins without a <mask> are left out.
        model: a Hub repository, a folder, or the result of `load_protein_model`.
        output: a `.csv` file with a row for each prediction, or a folder of shards; None to stream the results.
        top_k: predictions for each <mask>.
        aligned: keep gaps.
        structure: a file of structure letters for a model of pairs, such as SaProt; see `data.structures.Structures`.
        strict: raise an error for a bad record instead of leaving it out.
        progress: called after each step; True shows a progress bar.
        loading: see `load_protein_model`.

    Returns:
        See `embed`. The arrays are `positions` [masks], counted in residues from 0, and `tokens` (ids) and `scores`
        (probabilities), [masks, top_k].

    Raises:
        UserError: an option has an unknown value, the proteins cannot be read, or the output cannot be written.

    Example:
        >>> for result in fill_mask(["MKT<mask>YIAKQR"], "facebook/esm2_t6_8M_UR50D"):
        ...     result.arrays["scores"].shape
        (1, 5)
    """
    check_integer("top_k", top_k, 1)
    check_loading(model, **loading)
    source = ProteinSource.open(proteins, aligned, structure=structure)
    check_outputs(output, ("", ".csv"))
    from mlx_esm_hf.models.auto import MLXAutoModelForMaskedLM

    protein_model = as_protein_model(MLXAutoModelForMaskedLM, model, output, loading)
    refuse_structures(protein_model.vocabulary, structure)
    vocabulary = protein_model.vocabulary
    kept = min(top_k, protein_model.network.config.vocab_size)

    def check(ids: np.ndarray) -> None:
        if not np.isin(ids, vocabulary.masks).any():
            raise UserError("has no <mask>")

    def compute(items: Sequence[Item]) -> list[Arrays]:
        return predictions(protein_model, [item.content for item in items], kept)

    def result_bytes(positions: int) -> int:
        return 12 * kept * positions

    def write(path: Path, run: Run) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["number", "id", "position", "rank", "token", "score"])
            for result in run.results():
                a = result.arrays
                for position, ids, scores in zip(a["positions"], a["tokens"], a["scores"], strict=True):
                    ranked = zip(vocabulary.decode(ids), scores.tolist(), strict=True)
                    for rank, (token, score) in enumerate(ranked, 1):
                        table.writerow([result.number, result.id, position + 1, rank, token, score])

    items = ProteinItems(
        source,
        protein_model,
        result_bytes,
        output,
        check=check,
        lacks="<mask>",
        strict=strict,
        clean=vocabulary.alphabet.clean,
    )
    settings = {"top_k": top_k, "aligned": aligned}
    settings = load_checked(protein_model, "fill-mask", settings, items, output, progress)
    job = Job("fill-mask", settings, items, compute, protein_model.chunk_work, cause=protein_model.cause)
    return run_job(job, items, output, {"": None, ".csv": write}, progress)


def predictions(model: ProteinModel, sequences: Sequence[np.ndarray], count: int) -> list[Arrays]:
    """Return the arrays of `fill_mask` for each protein, given by its ids [positions]."""
    results: list[Arrays] = []
    for ids, rows in zip(sequences, model.blended_log_probabilities(sequences), strict=True):
        masked = np.isin(ids, model.vocabulary.masks)
        positions = np.flatnonzero(masked[model.vocabulary.residue_mask(ids)])
        order = np.argsort(-rows[masked], axis=1, kind="stable")[:, :count]
        scores = np.exp(np.take_along_axis(rows[masked], order, axis=1))
        results.append({"positions": positions, "tokens": order, "scores": scores})
    return results
