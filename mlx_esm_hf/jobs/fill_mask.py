"""What belongs where a sequence has <mask>."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_esm_hf.data.proteins import Report, Source
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.jobs.protein_job import ProteinJob
from mlx_esm_hf.jobs.protein_model import ProteinModel, as_protein_model
from mlx_esm_hf.models.auto import MLXAutoModelForMaskedLM
from mlx_esm_hf.runs.job import Arrays, Item, OnProgress, Result, no_progress
from mlx_esm_hf.runs.outputs import check_outputs
from mlx_esm_hf.runs.run import Run


def fill_mask(
    proteins: Source,
    model: str | ProteinModel,
    output: str | os.PathLike[str] | None = None,
    *,
    top_k: int = 5,
    aligned: bool = False,
    strict: bool = False,
    progress: OnProgress = no_progress,
    **loading: Any,
) -> Iterator[Result] | Report:
    """The most probable tokens at each <mask>, all masks at once, over the whole vocabulary.

    Args:
        proteins: see `read_proteins`; those without a <mask> are left out.
        output: a CSV file, a row for each proposal, or a folder of shards.
        loading: see `load`.

    Returns:
        See `embed`; the arrays are `positions` [masks], of residues from 0, `tokens` (ids) and `scores` [masks, top_k].
    """
    if top_k < 1:
        raise UserError(f"top_k={top_k}: at least one proposal is needed.")
    check_outputs(output, ("", ".csv"))
    protein_model = as_protein_model(MLXAutoModelForMaskedLM, model, output, loading)
    vocabulary = protein_model.vocabulary
    kept = min(top_k, protein_model.network.config.vocab_size)

    def check(ids: np.ndarray) -> None:
        if not (ids == vocabulary.mask).any():
            raise UserError("has no <mask>")

    def compute(items: Sequence[Item]) -> list[Arrays]:
        return proposals(protein_model, [item.content for item in items], kept)

    def size(residues: int) -> int:
        return 12 * kept * residues

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

    job = ProteinJob(
        "fill-mask", protein_model, {"top_k": top_k}, compute, size, check=check, aligned=aligned, strict=strict
    )
    if output is None:
        return job.stream(proteins)
    return job.write(proteins, Path(output), {"": None, ".csv": write}, progress)


def proposals(model: ProteinModel, sequences: Sequence[np.ndarray], count: int) -> list[Arrays]:
    """The results of `fill_mask` for sequences of ids."""
    results: list[Arrays] = []
    for ids, rows in zip(sequences, model.blended_log_probabilities(sequences), strict=True):
        masked = ids == model.vocabulary.mask
        positions = np.flatnonzero(masked[model.vocabulary.residues(ids)])
        order = np.argsort(-rows[masked], axis=1, kind="stable")[:, :count]
        scores = np.exp(np.take_along_axis(rows[masked], order, axis=1))
        results.append({"positions": positions, "tokens": order, "scores": scores})
    return results
