"""How well a model foresees a protein: pseudo-perplexity, exact and from one pass."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_esm_hf.data.proteins import RESIDUES, STANDARD, Report, Source
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.jobs.protein_job import ProteinJob, WriteRun, one_pass_work
from mlx_esm_hf.jobs.protein_model import ProteinModel, as_protein_model
from mlx_esm_hf.models.auto import MLXAutoModelForMaskedLM
from mlx_esm_hf.runs.formats import write_csv
from mlx_esm_hf.runs.job import Arrays, Item, OnProgress, Result, no_progress
from mlx_esm_hf.runs.outputs import check_outputs

METHODS = ("exact", "one-pass")
FORMATS: dict[str, WriteRun | None] = {"": None, ".csv": write_csv}


def perplexity(
    proteins: Source,
    model: str | ProteinModel,
    output: str | os.PathLike[str] | None = None,
    *,
    method: str = "exact",
    aligned: bool = False,
    strict: bool = False,
    progress: OnProgress = no_progress,
    **loading: Any,
) -> Iterator[Result] | Report:
    """The pseudo-perplexity of proteins, e^(-mean log p) over residues, each masked in turn (Salazar et al. 2020).

    Unknown residues (X), gaps and special tokens do not count.

    Args:
        proteins: see `read_proteins`.
        method: "exact" takes as many passes as there are residues, and reports the estimate beside it; "one-pass"
            computes the estimate alone, see `one_pass`.
        output: a CSV file, or a folder of shards.
        loading: see `load`.

    Returns:
        See `embed`; the arrays are `pseudo_perplexity` and `one_pass_estimate`, of one number each.
    """
    if method not in METHODS:
        raise UserError(f"method={method!r} is not one of {', '.join(METHODS)}.")
    check_outputs(output, FORMATS)
    protein_model = as_protein_model(MLXAutoModelForMaskedLM, model, output, loading)

    def compute(items: Sequence[Item]) -> list[Arrays]:
        return perplexities(protein_model, [item.content for item in items], method)

    def size(residues: int) -> int:
        return 16

    job = ProteinJob(
        "perplexity",
        protein_model,
        {"method": method},
        compute,
        size,
        work=pass_for_each_token if method == "exact" else one_pass_work,
        aligned=aligned,
        strict=strict,
    )
    if output is None:
        return job.stream(proteins)
    return job.write(proteins, Path(output), FORMATS, progress)


def pass_for_each_token(tokens: int) -> int:
    """The work of a pass through all tokens for each of them."""
    return tokens * tokens


def counted_ids(vocabulary: Vocabulary) -> np.ndarray:
    """The ids of the residues that count."""
    return np.array([vocabulary.ids[residue] for residue in RESIDUES if residue != "X" and residue in vocabulary.ids])


def perplexities(model: ProteinModel, sequences: Sequence[np.ndarray], method: str) -> list[Arrays]:
    """The results of `perplexity` for sequences of ids."""
    counted = counted_ids(model.vocabulary)
    results: list[Arrays] = []
    for ids, plain in zip(sequences, model.blended_log_probabilities(sequences), strict=True):
        positions = np.flatnonzero(np.isin(ids, counted))
        arrays = {}
        if method == "exact":
            rows = model.masked_log_probabilities(ids, positions.tolist())
            arrays["pseudo_perplexity"] = _perplexity(rows[np.arange(len(positions)), ids[positions]])
        arrays["one_pass_estimate"] = _perplexity(one_pass(plain[positions, ids[positions]]))
        results.append(arrays)
    return results


def one_pass(log_probabilities: np.ndarray) -> np.ndarray:
    """What log p of a residue would be under a mask, estimated from log u, the model's answer while it is seen.

    In training, of the tokens that are not masked but have to be predicted one half is what it was and the other is
    one of 20 residues at random. A model that has learned that answers, for a residue that it sees and would itself
    expect with probability p, u = p (1 + 1/20) / (p + 1/20); solved for p, p = u / (21 - 20 u).

    That one pass suffices is Kantroo et al. 2024 (arXiv:2407.07265), who train a head for it; this inverts the
    corruption instead and needs none.
    """
    residues = len(STANDARD)
    u = np.exp(log_probabilities.astype(np.float64))
    return log_probabilities - np.log((residues + 1) - residues * u)


def _perplexity(log_probabilities: np.ndarray) -> np.ndarray:
    mean = log_probabilities.mean(dtype=np.float64) if len(log_probabilities) else np.nan
    return np.exp(-np.array([mean]))
