"""How well a model foresees a protein: pseudo-perplexity, exact and from one pass."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mlx_esm_hf import MLXEsmForMaskedLM
from mlx_esm_hf.data.proteins import RESIDUES, STANDARD, Report, Source
from mlx_esm_hf.pipelines.model import Loaded, as_loaded
from mlx_esm_hf.runs.formats import write_csv
from mlx_esm_hf.runs.job import Cost, Job, Progress, check_output, no_progress
from mlx_esm_hf.runs.run import Arrays, Item, Record

METHODS = ("exact", "one-pass")
FORMATS = {"": None, ".csv": write_csv}


def perplexity(
    proteins: Source,
    model: str | Loaded,
    output: str | os.PathLike[str] | None = None,
    *,
    method: str = "exact",
    aligned: bool = False,
    strict: bool = False,
    progress: Progress = no_progress,
    **loading: Any,
) -> Iterator[Record] | Report:
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
        raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}.")
    check_output(output, FORMATS)
    loaded = as_loaded(MLXEsmForMaskedLM, model, output, loading)
    vocabulary = loaded.vocabulary
    counted = np.array([vocabulary[residue] for residue in RESIDUES if residue != "X"])

    def compute(items: Sequence[Item]) -> list[Arrays]:
        results, sequences = [], [item.content for item in items]
        plain = loaded.blended_log_probabilities(sequences)
        for ids, log_probabilities in zip(sequences, plain, strict=True):
            positions = np.flatnonzero(np.isin(ids, counted))
            seen = one_pass(log_probabilities[positions, ids[positions]])
            arrays = {"one_pass_estimate": _perplexity(seen)}
            if method == "exact":
                rows = loaded.masked_log_probabilities(ids, positions.tolist())
                exact = _perplexity(rows[np.arange(len(positions)), ids[positions]])
                arrays = {"pseudo_perplexity": exact, **arrays}
            results.append(arrays)
        return results

    passes = (lambda tokens: tokens * tokens) if method == "exact" else (lambda tokens: tokens)
    job = Job(
        "perplexity",
        loaded,
        {"method": method},
        compute,
        Cost(passes, lambda residues: 16),
        FORMATS,
        aligned=aligned,
        strict=strict,
    )
    return job.run(proteins, output, progress)


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
