"""Pseudo-perplexity of proteins, exact and estimated from one pass."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from mlx_esm_hf.checks import check_choice
from mlx_esm_hf.data.alphabets import Proteins as ProteinAlphabet
from mlx_esm_hf.data.proteins import STANDARD, Report
from mlx_esm_hf.data.source import Proteins, ProteinSource
from mlx_esm_hf.data.vocabulary import refuse_other_sequences, refuse_structures
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.jobs.protein_job import ProteinItems, load_checked, one_pass_work, run_job
from mlx_esm_hf.jobs.protein_model import ProteinModel, as_protein_model, check_loading
from mlx_esm_hf.runs.formats import write_csv
from mlx_esm_hf.runs.job import Arrays, Item, Job, OnProgress, Result, no_progress
from mlx_esm_hf.runs.outputs import check_outputs
from mlx_esm_hf.runs.run import WriteRun

METHODS = ("exact", "one-pass")
FORMATS: dict[str, WriteRun | None] = {"": None, ".csv": write_csv}


@overload
def perplexity(
    proteins: Proteins, model: str | ProteinModel, output: None = None, **options: Any
) -> Iterator[Result]: ...


@overload
def perplexity(
    proteins: Proteins, model: str | ProteinModel, output: str | os.PathLike[str], **options: Any
) -> Report: ...


def perplexity(
    proteins: Proteins,
    model: str | ProteinModel,
    output: str | os.PathLike[str] | None = None,
    *,
    method: str = "exact",
    aligned: bool = False,
    structure: str | os.PathLike[str] | None = None,
    strict: bool = False,
    progress: OnProgress | bool = no_progress,
    **loading: Any,
) -> Iterator[Result] | Report:
    """Compute the pseudo-perplexity of proteins: exp(−mean log p) over residues, each masked in turn.

    Unknown residues (X), gaps and special tokens do not count. Proteins of nothing else are left out.

    Args:
        proteins: see `read_proteins`.
        model: a Hub repository, a folder, or the result of `load_protein_model`.
        output: a `.csv` file, or a folder of shards; None to stream the results.
        method: "exact" needs a pass for each residue, and returns the estimate as well; "one-pass" computes only the
            estimate, see `one_pass`.
        aligned: keep gaps.
        structure: a file of structure letters for a model of pairs, such as SaProt; see `data.structures.Structures`.
        strict: raise an error for a bad record instead of leaving it out.
        progress: called after each step; True shows a progress bar.
        loading: see `load_protein_model`.

    Returns:
        See `embed`. The arrays are `pseudo_perplexity` and, for proteins, `one_pass_estimate`, [1] each. The
        perplexity of DNA is that of a token. The perplexity of pairs of residues and structure letters is that of a
        residue whose structure letter is visible.

    Raises:
        UserError: an option has an unknown value, the proteins cannot be read, or the output cannot be written.

    Source: Salazar et al. 2020, arXiv:1910.14659.

    Example:
        >>> for result in perplexity(["MKTAYIAKQR"], "facebook/esm2_t6_8M_UR50D"):
        ...     float(result.arrays["pseudo_perplexity"][0])
    """
    check_choice("method", method, METHODS)
    check_loading(model, **loading)
    source = ProteinSource.open(proteins, aligned, structure=structure)
    check_outputs(output, FORMATS)
    from mlx_esm_hf.models.auto import MLXAutoModelForMaskedLM

    protein_model = as_protein_model(MLXAutoModelForMaskedLM, model, output, loading)
    refuse_structures(protein_model.vocabulary, structure)
    if method != "exact":  # its formula is that of proteins
        refuse_other_sequences(protein_model.vocabulary, f"perplexity --method {method}")
    counted = protein_model.vocabulary.predicted

    def check(ids: np.ndarray) -> None:
        if not np.isin(ids, counted).any():
            raise UserError("has no residue that counts (X, gaps and special tokens do not)")

    def compute(items: Sequence[Item]) -> list[Arrays]:
        return perplexities(protein_model, [item.content for item in items], method)

    def result_bytes(positions: int) -> int:
        return 16

    work = pass_for_each_token if method == "exact" else one_pass_work
    options: Any = {"work": work, "check": check, "strict": strict, "clean": protein_model.vocabulary.alphabet.clean}
    items = ProteinItems(source, protein_model, result_bytes, output, **options)
    settings = {"method": method, "aligned": aligned}
    settings = load_checked(protein_model, "perplexity", settings, items, output, progress)
    job = Job("perplexity", settings, items, compute, protein_model.chunk_work, cause=protein_model.cause)
    return run_job(job, items, output, FORMATS, progress)


def pass_for_each_token(tokens: int) -> int:
    """Return the work of as many passes through a window as it has tokens."""
    return tokens * tokens


def perplexities(model: ProteinModel, sequences: Sequence[np.ndarray], method: str) -> list[Arrays]:
    """Return the arrays of `perplexity` for each protein, given by its ids [positions]."""
    vocabulary = model.vocabulary
    results: list[Arrays] = []
    for ids, plain in zip(sequences, model.blended_log_probabilities(sequences), strict=True):
        positions = np.flatnonzero(np.isin(ids, vocabulary.predicted))
        arrays = {}
        if method == "exact":
            rows = model.masked_log_probabilities(ids, positions.tolist())
            arrays["pseudo_perplexity"] = _perplexity(vocabulary.log_probability(rows, ids[positions]))
        if type(vocabulary.alphabet) is ProteinAlphabet:
            arrays["one_pass_estimate"] = _perplexity(one_pass(plain[positions, ids[positions]]))
        results.append(arrays)
    return results


def one_pass(log_probabilities: np.ndarray) -> np.ndarray:
    """Estimate log p of masked residues from log u, the model's prediction while the residues are visible.

    Half of the visible tokens that are predicted in training are unchanged, the other half are replaced by one of 20
    residues at random. A model that has learned this predicts a visible residue, which it would expect with
    probability p if it were masked, with u = p (1 + 1/20) / (p + 1/20). Solved for p, this is p = u / (21 − 20 u).

    Args:
        log_probabilities: log u, any shape.

    Source: Kantroo et al. 2024 (arXiv:2407.07265) show that one pass suffices, with a head trained for it. This
    function inverts the corruption of training instead and needs no head.
    """
    residues = len(STANDARD)
    u = np.exp(log_probabilities.astype(np.float64))
    return log_probabilities - np.log((residues + 1) - residues * u)


def _perplexity(log_probabilities: np.ndarray) -> np.ndarray:
    return np.exp(-np.array([log_probabilities.mean(dtype=np.float64)]))
