"""Effects of mutations without training on them (Meier et al. 2021, doi:10.1101/2021.07.09.450648)."""

from __future__ import annotations

import csv
import gc
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_esm_hf import plots
from mlx_esm_hf.data.mutations import Substitution, parse, read_table, suggest_first_residue
from mlx_esm_hf.data.proteins import CHAIN_BREAK, STANDARD, Report, clean, read_proteins, tokens
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.jobs.protein_job import CHUNK_BATCHES
from mlx_esm_hf.jobs.protein_model import ProteinModel, as_protein_model
from mlx_esm_hf.models.auto import MLXAutoModelForMaskedLM
from mlx_esm_hf.runs.job import Arrays, Item, Job, OnProgress, Result, no_progress, stream
from mlx_esm_hf.runs.outputs import check_outputs, check_picture, claimed, shards_of, write_files, write_new
from mlx_esm_hf.runs.run import compute_run
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.files import Write

Mutant = list[Substitution]

METHODS = ("masked-marginals", "wt-marginals", "pseudo-perplexity")


class Scores(NamedTuple):
    """The table with a score column for each model; what was not scored, and why; letters of the wild type that were
    read as X."""

    columns: list[str]
    rows: list[dict[str, Any]]
    left_out: list[str]
    replaced: int = 0


def score(
    mutants: str | os.PathLike[str] | Sequence[str] | None,
    sequence: str | os.PathLike[str],
    model: str | ProteinModel | Sequence[str | ProteinModel],
    output: str | os.PathLike[str] | None = None,
    *,
    method: str = "masked-marginals",
    mutant_column: str = "mutant",
    first_residue: int = 1,
    picture: str | os.PathLike[str] | None = None,
    progress: OnProgress = no_progress,
    **loading: Any,
) -> Scores:
    """Score mutations of a protein: the higher, the more the model expects the mutant.

    "masked-marginals": log p(mutant) - log p(wild type) at the position, while it is masked. "wt-marginals": the same
    without a mask, in one pass. Both over the whole vocabulary, summed over the substitutions of a mutant, each in the
    wild type's context. "pseudo-perplexity": the sum over all positions of the mutant's log p, each masked in turn.
    fair-esm's `variant-prediction/predict.py` has the same three (its pseudo-perplexity is one position off).

    Args:
        mutants: a CSV file, or mutations like `A42G` or `A42G:L7P`; None, all 20 residues at each position.
        sequence: the wild type, or a FASTA file with one.
        model: one, or several, such as the five of ESM-1v.
        output: a CSV file to write.
        mutant_column: of the CSV file.
        first_residue: the number of the first residue in the table.
        picture: draw the scores of all mutations (`mutants=None`) as a heat map (`.png`, `.svg`, `.pdf`).
        loading: see `load`.

    Returns:
        The rows, with a column for each model under its name, and their `mean` if they are several. Mutations that do
        not fit the sequence have no score, and are named.

    Raises:
        ValueError: no mutation fits; the message suggests another `first_residue` if one does.

    Example:
        >>> score(["K2A"], "MKTAYIAKQR", "facebook/esm2_t6_8M_UR50D").rows
        [{'mutant': 'K2A', 'facebook/esm2_t6_8M_UR50D': -1.2}]
    """
    if method not in METHODS:
        raise UserError(f"method={method!r} is not one of {', '.join(METHODS)}.")
    if picture is not None and mutants is not None:
        raise UserError("A heat map is of all mutations: leave out the list of mutants.")
    check_picture(picture)
    check_outputs(output, [".csv"], picture)
    report = Report()
    wild_type = read_wild_type(sequence, report)
    columns, rows = _table(mutants, mutant_column, wild_type, first_residue)
    parsed, left_out = _parse(rows, mutant_column, wild_type, first_residue)

    models = [model] if isinstance(model, (str, os.PathLike, ProteinModel)) else list(model)
    names = [m.name if isinstance(m, ProteinModel) else str(m) for m in models]
    columns += [*names, "mean"] if len(names) > 1 else names
    if repeated := [name for name in columns if columns.count(name) > 1]:
        raise UserError(f"Two columns would be called {repeated[0]!r}.")
    scores = Scores(columns, rows, left_out, report.replaced)
    with claimed(None if output is None else Path(output), [] if picture is None else [Path(picture)]):
        shards = None if output is None else shards_of(output)
        _fill(scores, dict(zip(names, models, strict=True)), wild_type, parsed, method, shards, loading, progress)
        _write_all(scores, output, shards, picture, mutant_column)
    return scores


def _fill(
    scores: Scores,
    models: dict[str, str | ProteinModel],
    wild_type: str,
    mutants: dict[int, Mutant],
    method: str,
    shards: Path | None,
    loading: dict[str, Any],
    on_progress: OnProgress,
) -> None:
    """Put the scores of each model into its column, one model after the other, and their mean."""
    unread: dict[int, str] = {}
    for number, (name, model) in enumerate(models.items(), 1):
        gc.collect()  # the model before: one whose parts refer to it does not go by itself
        folder = None if shards is None else shards / str(number)
        values, length = _score(model, wild_type, mutants, method, folder, loading, on_progress)
        beyond = [i for i, mutant in mutants.items() if any(s.position >= length for s in mutant)]
        unread |= {i: f"row {i + 1}: {name} reads {length} residues." for i in beyond}
        for index, value in values.items():
            scores.rows[index][name] = value
    scores.left_out.extend(unread.values())
    if len(models) > 1:
        for row in scores.rows:
            if all(name in row for name in models):
                row["mean"] = float(np.mean([row[name] for name in models]))


def _write_all(
    scores: Scores,
    output: str | os.PathLike[str] | None,
    shards: Path | None,
    picture: str | os.PathLike[str] | None,
    mutant_column: str,
) -> None:
    files: dict[Path, Write] = {}
    if picture is not None:
        files[Path(picture)] = lambda path: heat_map(scores, path, mutant_column)
    if output is not None:
        files[Path(output)] = lambda path: write_table(path, scores.columns, scores.rows)
    if shards is not None:
        distributed.on_rank_0(lambda: write_files(files, shards))
    else:
        for path, write in files.items():
            write_new(path, write)


def _score(
    model: str | ProteinModel,
    wild_type: str,
    mutants: dict[int, Mutant],
    method: str,
    folder: Path | None,
    loading: dict[str, Any],
    on_progress: OnProgress,
) -> tuple[dict[int, float], int]:
    """The score of each mutant to one model, from a run of its own, and how many residues of the wild type it reads.

    The model lives no longer than this call, so that there is one at a time.
    """
    protein_model = as_protein_model(MLXAutoModelForMaskedLM, model, folder, loading)
    try:
        ids = protein_model.encode(wild_type)
        protein_model.refuse_long(len(ids))
    except ValueError as error:
        raise UserError(f"The wild type {error}.") from None
    within = {i: m for i, m in mutants.items() if all(s.position < len(ids) for s in m)}
    job = _job(protein_model, ids, within, method)
    if folder is None:
        results = list(stream(job))
    else:
        run = compute_run(job, folder, on_progress)
        if not distributed.is_rank_0():  # the first one writes the table
            return {}, len(ids)
        results = list(run.results())
    if method == "pseudo-perplexity":
        return {result.number: float(result.arrays["score"][0]) for result in results}, len(ids)
    return _differences(results, within, method, protein_model.vocabulary.ids), len(ids)


def _job(model: ProteinModel, ids: np.ndarray, mutants: dict[int, Mutant], method: str) -> Job:
    """What a method has to compute for these mutants of a wild type."""
    pass_work = sum(window.length for window in model.windows(0, len(ids)))
    row_bytes = 4 * model.network.config.vocab_size

    def pseudo_perplexities(items: Sequence[Item]) -> list[Arrays]:
        variants = [mutated(ids, item.content, model.vocabulary.ids) for item in items]
        return [{"score": np.array([pseudo_log_likelihood(model, variant)])} for variant in variants]

    def masked_rows(items: Sequence[Item]) -> list[Arrays]:
        rows = model.masked_log_probabilities(ids, [item.content for item in items])
        return [{"log_probabilities": row} for row in rows]

    def all_rows(items: Sequence[Item]) -> list[Arrays]:
        return [{"log_probabilities": model.blended_log_probabilities([ids])[0]} for _ in items]

    if method == "pseudo-perplexity":
        compute = pseudo_perplexities
        items = [Item(i, mutant_name(m), m, len(ids), pass_work * len(ids), 8) for i, m in mutants.items()]
    elif method == "masked-marginals":
        compute = masked_rows
        positions = sorted({s.position for mutant in mutants.values() for s in mutant})
        items = [Item(p, str(p + 1), p, len(ids), pass_work, row_bytes) for p in positions]
    else:
        compute = all_rows
        items = [Item(0, "wild type", None, len(ids), pass_work, row_bytes * len(ids))]
    digest = hashlib.sha256(repr(sorted(mutants.items())).encode()).hexdigest()
    return Job(
        command="score",
        settings=model.settings | {"method": method, "sequence": ids.tolist()},
        input={"name": "mutants", "sha256": digest},
        items=lambda: items,
        compute=compute,
        chunk_work=CHUNK_BATCHES * model.batch_tokens,
        total=sum(item.length for item in items),
    )


def _differences(
    results: Sequence[Result], mutants: dict[int, Mutant], method: str, token_ids: dict[str, int]
) -> dict[int, float]:
    """Log p of the mutant's residues less that of the wild type's, summed over the substitutions."""
    if method == "masked-marginals":
        table = {result.number: result.arrays["log_probabilities"] for result in results}
    else:
        table = dict(enumerate(results[0].arrays["log_probabilities"]))
    scores = {}
    for index, mutant in mutants.items():
        gains = [table[s.position][token_ids[s.mutant]] - table[s.position][token_ids[s.wild_type]] for s in mutant]
        scores[index] = float(sum(gains))
    return scores


def mutated(ids: np.ndarray, mutant: Mutant, token_ids: dict[str, int]) -> np.ndarray:
    """The ids of a mutant of a wild type."""
    ids = ids.copy()
    for substitution in mutant:
        ids[substitution.position] = token_ids[substitution.mutant]
    return ids


def read_wild_type(sequence: str | os.PathLike[str], report: Report | None = None) -> str:
    """A sequence, or that of the FASTA file with this name.

    Args:
        report: counts the letters that became X.

    Raises:
        ValueError: neither; several proteins, or one that cannot be read; gaps, since those behind one would have
            other numbers in the sequence than in the table.
    """
    report = report or Report()
    report.strict = True
    if not os.path.exists(sequence):
        text = os.fspath(sequence)
        try:
            wild_type = clean(text, report=report)
        except ValueError as error:
            raise UserError(f"{text!r} is neither a file nor a sequence: it {error}.") from None
    else:
        proteins = list(read_proteins(sequence, report=report))
        if len(proteins) != 1:
            raise UserError(f"{sequence} holds {len(proteins)} proteins; the wild type has to be the only one.")
        wild_type = proteins[0].sequence
    if report.gaps:
        raise UserError(f"The wild type has {report.gaps} gaps (- or .), which have no number: remove them.")
    return wild_type


def _table(
    mutants: str | os.PathLike[str] | Sequence[str] | None, column: str, wild_type: str, first_residue: int
) -> tuple[list[str], list[dict[str, Any]]]:
    if mutants is None:
        places = enumerate(tokens(wild_type.replace(CHAIN_BREAK, "")), first_residue)
        return [column], [{column: f"{residue}{place}{to}"} for place, residue in places for to in STANDARD]
    if isinstance(mutants, (str, os.PathLike)):
        columns, rows = read_table(mutants, column)
        return columns, [dict(row) for row in rows]
    return [column], [{column: mutant} for mutant in mutants]


def _parse(
    rows: list[dict[str, Any]], column: str, wild_type: str, first_residue: int
) -> tuple[dict[int, Mutant], list[str]]:
    parsed: dict[int, Mutant] = {}
    left_out: list[str] = []
    for index, row in enumerate(rows):
        try:
            parsed[index] = parse(row[column], wild_type, first_residue)
        except ValueError as error:
            left_out.append(f"row {index + 1}: {error}.")
    advice = ""
    if 2 * len(parsed) < len(rows):
        better = suggest_first_residue([row[column] for row in rows], wild_type)
        if better not in (None, first_residue):
            advice = f" More would fit with --first-residue {better}."
    if rows and not parsed:
        raise UserError("\n".join([f"No mutation fits the sequence.{advice}", *left_out[:5]]))
    if advice:
        left_out.append(f"{len(left_out)} of {len(rows)} mutations.{advice}")
    return parsed, left_out


def mutant_name(substitutions: Mutant) -> str:
    """Such as A42G:L7P, residues counted from 1."""
    return ":".join(f"{s.wild_type}{s.position + 1}{s.mutant}" for s in substitutions)


def pseudo_log_likelihood(model: ProteinModel, ids: np.ndarray) -> float:
    """The sum of log p over all residues, each masked in turn (Salazar et al. 2020, arXiv:1910.14659)."""
    places = np.flatnonzero(model.vocabulary.residues(ids))
    rows = model.masked_log_probabilities(ids, places.tolist())
    return float(rows[np.arange(len(places)), ids[places]].sum(dtype=np.float64))


def write_table(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV file; what a row lacks stays empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def scan_grid(scores: Scores, mutant_column: str = "mutant") -> tuple[np.ndarray, list[str], int]:
    """Return the last score column of a scan (`mutants=None`) as a grid.

    Returns:
        The scores [20 residues, positions], the wild type at each position, and the number of the first position.
    """
    values: dict[tuple[int, str], float] = {}
    wild_types: dict[int, str] = {}
    for row in scores.rows:
        mutant, value = row[mutant_column], row.get(scores.columns[-1])
        if value is not None:
            values[int(mutant[1:-1]), mutant[-1]] = value
            wild_types[int(mutant[1:-1])] = mutant[0]
    places = sorted(wild_types)
    grid = np.array([[values[place, residue] for place in places] for residue in STANDARD])
    return grid, [wild_types[place] for place in places], places[0]


def heat_map(scores: Scores, path: str | os.PathLike[str], mutant_column: str = "mutant") -> None:
    """Write the scores of a scan as a picture."""
    grid, wild_type, first_residue = scan_grid(scores, mutant_column)
    plots.mutation_scan(grid, wild_type, STANDARD, first_residue).savefig(path, dpi=plots.DPI)
