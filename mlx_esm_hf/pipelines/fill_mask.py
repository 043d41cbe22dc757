"""What belongs where a sequence has <mask>."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_esm_hf import MLXEsmForMaskedLM
from mlx_esm_hf.data.proteins import Report, Source
from mlx_esm_hf.pipelines.model import Loaded, as_loaded
from mlx_esm_hf.runs.job import Cost, Job, Progress, check_output, no_progress
from mlx_esm_hf.runs.run import Arrays, Item, Record, Run


def fill_mask(
    proteins: Source,
    model: str | Loaded,
    output: str | os.PathLike[str] | None = None,
    *,
    top_k: int = 5,
    aligned: bool = False,
    strict: bool = False,
    progress: Progress = no_progress,
    **loading: Any,
) -> Iterator[Record] | Report:
    """The most probable tokens at each <mask>, all masks at once, over the whole vocabulary.

    Args:
        proteins: see `read_proteins`; those without a <mask> are left out.
        output: a CSV file, a row for each proposal, or a folder of shards.
        loading: see `load`.

    Returns:
        See `embed`; the arrays are `positions` [masks], from 0, `tokens` (ids) and `scores` [masks, top_k].
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: at least one proposal is needed.")
    check_output(output, ("", ".csv"))
    loaded = as_loaded(MLXEsmForMaskedLM, model, output, loading)
    mask = loaded.tokenizer.mask_token_id
    kept = min(top_k, loaded.model.config.vocab_size)

    def check(ids: np.ndarray) -> None:
        if not (ids == mask).any():
            raise ValueError("has no <mask>")

    def compute(items: Sequence[Item]) -> list[Arrays]:
        sequences, results = [item.content for item in items], list[Arrays]()
        for ids, rows in zip(sequences, loaded.blended_log_probabilities(sequences), strict=True):
            positions = np.flatnonzero(ids == mask)
            order = np.argsort(-rows[positions], axis=1, kind="stable")[:, :kept]
            scores = np.exp(np.take_along_axis(rows[positions], order, axis=1))
            results.append({"positions": positions, "tokens": order, "scores": scores})
        return results

    def write(path: Path, run: Run) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["record", "id", "position", "rank", "token", "score"])
            for record in run.records():
                a = record.arrays
                for position, tokens, scores in zip(a["positions"], a["tokens"], a["scores"], strict=True):
                    for rank, (token, score) in enumerate(zip(tokens.tolist(), scores.tolist(), strict=True), 1):
                        name = loaded.tokenizer.convert_ids_to_tokens(token)
                        table.writerow([record.number, record.id, position + 1, rank, name, score])

    cost = Cost(lambda tokens: tokens, lambda residues: 12 * kept * residues)
    formats = {"": None, ".csv": write}
    job = Job("fill-mask", loaded, {"top_k": top_k}, compute, cost, formats, check, aligned, strict)
    return job.run(proteins, output, progress)
