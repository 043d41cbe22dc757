"""Zero-shot effects of mutations (Meier et al. 2021, doi:10.1101/2021.07.09.450648)."""

from __future__ import annotations

import csv
import dataclasses
import gc
import hashlib
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_esm_hf import plots
from mlx_esm_hf.checks import MOST, check_choice, check_integer
from mlx_esm_hf.data.alphabets import UNKNOWN, Nucleotides, Pairs, Proteins, is_paired
from mlx_esm_hf.data.mutations import Substitution, parse, read_table, suggest_first_residue
from mlx_esm_hf.data.proteins import CHAIN_BREAK, Report, clean, tokens
from mlx_esm_hf.data.source import ProteinSource
from mlx_esm_hf.data.vocabulary import Vocabulary, refuse_other_sequences
from mlx_esm_hf.demo import shown_name
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.jobs.protein_model import ProteinModel, as_protein_model, check_loading
from mlx_esm_hf.runs.job import (
    LOADING,
    Arrays,
    Item,
    ItemList,
    Job,
    OnProgress,
    Result,
    as_on_progress,
    begin,
    no_progress,
)
from mlx_esm_hf.runs.outputs import (
    check_outputs,
    check_picture,
    claimed,
    refuse_other_run,
    shards_of,
    write_files,
    write_new,
)
from mlx_esm_hf.runs.run import compute_run, stream
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.files import Write

Mutant = list[Substitution]
Change = dict[int, int]  # {position: id}

METHODS = ("masked-marginals", "wt-marginals", "pseudo-perplexity")


class Scorer(NamedTuple):
    """A model, and what it scores.

    Attributes:
        model: the model.
        ids: ids [positions] of the wild type.
        length: number of residues that the model reads.
        mutants: {row: mutant} within these residues.
        changes: {row: {position: id}}, the tokens that each mutant changes.
        folder: the folder of the run; None writes no files.
    """

    model: ProteinModel
    ids: np.ndarray
    length: int
    mutants: dict[int, Mutant]
    changes: dict[int, Change]
    folder: Path | None


class Scores(NamedTuple):
    """Scores of mutants.

    Attributes:
        columns: names of the columns.
        rows: the rows of the table; the score of a model is in the column with its name.
        left_out: a message for each mutant that was not scored.
        replaced: number of letters of the wild type that were read as `unknown`; the largest over the models.
        unknown: see `Report`.
    """

    columns: list[str]
    rows: list[dict[str, Any]]
    left_out: list[str]
    replaced: int = 0
    unknown: str = "X"


def score(
    mutants: str | os.PathLike[str] | Sequence[str] | None,
    sequence: str | os.PathLike[str],
    model: str | ProteinModel | Sequence[str | ProteinModel],
    output: str | os.PathLike[str] | None = None,
    *,
    method: str = "masked-marginals",
    mutant_column: str = "mutant",
    first_residue: int = 1,
    structure: str | os.PathLike[str] | None = None,
    picture: str | os.PathLike[str] | None = None,
    progress: OnProgress | bool = no_progress,
    **loading: Any,
) -> Scores:
    """Score mutants of a protein: the higher the score, the more plausible the mutant is to the model.

    Args:
        mutants: a CSV file, or mutants such as `A42G` or `A42G:L7P`; None for all 20 residues, or 4 nucleotides, at
            each position.
        sequence: the wild type, or a FASTA file that contains only the wild type; for SaProt also pairs: `MdEvVp`.
        model: a Hub repository, a folder or the result of `load_protein_model`; or several, such as the five of ESM-1v.
        output: a `.csv` file; None writes no file.
        method: how a mutant is scored. "masked-marginals" is log p(mutant) − log p(wild type) at the position while it
            is masked. "wt-marginals" is the same without a mask, in one pass. Both are summed over the substitutions of
            a mutant, each in the context of the wild type. "pseudo-perplexity" is the sum of log p over all positions
            of the mutant, each masked in turn. Probabilities are over the whole vocabulary. A model of pairs, such as
            SaProt, sums the probability of a residue over its pairs, and a masked residue keeps its structure letter.
            In DNA, the token that contains the nucleotide is masked and replaced.
        mutant_column: column of the mutants in the CSV file.
        first_residue: the number of the sequence's first residue in the mutants.
        structure: a file of structure letters for a model of pairs, with the id of the record in the FASTA file.
        picture: draw the scores of all mutants (`mutants=None`) as a heat map (`.png`, `.svg`, `.pdf`).
        progress: called after each step; True shows a progress bar.
        loading: see `load_protein_model`.

    Returns:
        The table, with a column for each model, and their `mean` if there are several. Mutants that do not match the
        sequence have no score and are listed in `left_out`.

    Raises:
        UserError: an option has an unknown value, the table or the sequence cannot be read, or no mutant matches the
            sequence. The message suggests another `first_residue` if it would match.

    Source: fair-esm's `variant-prediction/predict.py`, whose pseudo-perplexity is one position off.

    Example:
        >>> score(["K2A"], "MKTAYIAKQR", "facebook/esm2_t6_8M_UR50D").rows
        [{'mutant': 'K2A', 'facebook/esm2_t6_8M_UR50D': -1.2}]
    """
    check_choice("method", method, METHODS)
    check_integer("first_residue", first_residue, -MOST)
    check_loading(model, **loading)
    check_picture(picture)
    if picture is not None and mutants is not None:
        raise UserError("A heat map shows all mutations. Leave out the list of mutants.")
    check_outputs(output, [".csv"], picture)
    report = Report()
    pairs = read_wild_type(sequence, report, structure)
    wild_type = residues_of(pairs)
    columns, rows = ([mutant_column], []) if mutants is None else _table(mutants, mutant_column)
    parsed, left_out = _parse(rows, mutant_column, wild_type, first_residue)
    shards = None if output is None else shards_of(output)
    models = [model] if isinstance(model, (str, os.PathLike, ProteinModel)) else list(model)
    if not models:
        raise UserError("model must be a model or a list of at least one, got none.")
    names = [m.name if isinstance(m, ProteinModel) else shown_name(m) for m in models]
    columns += [*names, "mean"] if len(names) > 1 else names
    if repeated := [name for name in columns if columns.count(name) > 1]:
        raise UserError(f"Two columns would be named {repeated[0]!r}. Rename the column in the table.")
    opened = _open_models(models, shards, method, loading)
    alphabet = opened[0].vocabulary.alphabet
    if mutants is None:
        rows = [{mutant_column: mutant} for mutant in _scan(wild_type, first_residue, alphabet.scanned)]
        parsed, left_out = _parse(rows, mutant_column, wild_type, first_residue)
    elif isinstance(alphabet, Nucleotides):
        left_out += _drop_residues(parsed, rows, mutant_column, alphabet.scanned)
    on_progress = as_on_progress(progress)
    reports = [dataclasses.replace(report) for _ in opened]
    scorers = [
        _scorer(protein_model, None if shards is None else shards / str(number), pairs, parsed, method, found)
        for number, (protein_model, found) in enumerate(zip(opened, reports, strict=True), 1)
    ]
    most = max(reports, key=lambda found: found.replaced)
    scores = Scores(columns, rows, left_out, most.replaced, most.unknown)
    del opened  # the scorers own the models, and go one after the other
    with claimed(None if output is None else Path(output), [] if picture is None else [Path(picture)]):
        _fill(scores, names, scorers, parsed, method, shards, on_progress)
        _write_all(scores, output, shards, picture, mutant_column)
    return scores


def _open_models(
    models: Sequence[str | ProteinModel], shards: Path | None, method: str, loading: dict[str, Any]
) -> list[ProteinModel]:
    """Open all models, without their weights, and check that they read the same sequences.

    Raises:
        UserError: some are for DNA and others are not, or one is for sequences that cannot be scored.
    """
    from mlx_esm_hf.models.auto import MLXAutoModelForMaskedLM

    opened = []
    for number, model in enumerate(models, 1):
        folder = None if shards is None else shards / str(number)
        opened.append(as_protein_model(MLXAutoModelForMaskedLM, model, folder, loading))
        kinds = (Nucleotides,) if isinstance(opened[0].vocabulary.alphabet, Nucleotides) else (Proteins, Pairs)
        refuse_other_sequences(opened[-1].vocabulary, "score", kinds if number > 1 else (Proteins, Pairs, Nucleotides))
    return opened


def _scorer(
    model: ProteinModel,
    folder: Path | None,
    wild_type: str,
    mutants: dict[int, Mutant],
    method: str,
    report: Report,
) -> Scorer:
    """Check the wild type and an earlier run before the weights of a model are loaded."""
    vocabulary = model.vocabulary
    takes_residues = type(vocabulary.alphabet) is Proteins
    try:
        read = residues_of(wild_type) if takes_residues else vocabulary.alphabet.clean(wild_type, report=report)
        ids = model.encode(read)
        model.refuse_long(len(ids))
    except UserError as error:
        raise UserError(f"The wild type {error}.") from None
    length = vocabulary.spans(ids)[-1, 1]
    within = {i: m for i, m in mutants.items() if all(s.position < length for s in m)}
    settings = _settings(model.known_settings, ids, method)
    distributed.on_rank_0(partial(refuse_other_run, folder, "score", settings, _input(within)))
    changes = {i: vocabulary.mutated(ids, [(s.position, s.mutant) for s in m]) for i, m in within.items()}
    return Scorer(model, ids, length, within, changes, folder)


def _fill(
    scores: Scores,
    names: list[str],
    scorers: list[Scorer],
    mutants: dict[int, Mutant],
    method: str,
    shards: Path | None,
    on_progress: OnProgress,
) -> None:
    """Add the scores of each model, one model after the other, and their mean to the table."""
    unread: dict[int, str] = {}
    for name in names:
        on_progress(begin(LOADING, f"loading {name}"))
        gc.collect()  # frees the previous model, which contains reference cycles
        values, length = _score(scorers.pop(0), method, on_progress)
        beyond = [i for i, mutant in mutants.items() if any(s.position >= length for s in mutant)]
        unread |= {i: f"row {i + 1}: {name} reads only the first {length} residues." for i in beyond}
        for index, value in values.items():
            scores.rows[index][name] = value
    scores.left_out.extend(unread.values())
    if len(names) > 1:
        for row in scores.rows:
            if all(name in row for name in names):
                row["mean"] = float(np.mean([row[name] for name in names]))


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


def _score(scorer: Scorer, method: str, on_progress: OnProgress) -> tuple[dict[int, float], int]:
    """Score mutants with one model, in a run of its own.

    The model is not referenced after this call, so that only one model is in memory at a time.

    Args:
        scorer: the model.
        method: see `score`.
        on_progress: called after each step.

    Returns:
        {row: score}, and the number of positions of the wild type that the model reads.
    """
    protein_model, ids, length, mutants, changes, folder = scorer
    protein_model.load()
    job = _job(protein_model, ids, mutants, changes, method)
    if folder is None:
        results = list(stream(job, on_progress))
    else:
        run = compute_run(job, folder, on_progress)
        if not distributed.is_rank_0():  # rank 0 writes the table
            return {}, length
        results = list(run.results())
    if method == "pseudo-perplexity":
        return {result.number: float(result.arrays["score"][0]) for result in results}, length
    return _differences(results, ids, changes, method, protein_model.vocabulary), length


def _job(
    model: ProteinModel, ids: np.ndarray, mutants: dict[int, Mutant], changes: dict[int, Change], method: str
) -> Job:
    """Return the job that computes what a method needs for mutants of a wild type, given by its ids."""
    pass_work = sum(window.length for window in model.windows(0, len(ids)))
    row_bytes = 4 * model.network.config.vocab_size

    def pseudo_perplexities(items: Sequence[Item]) -> list[Arrays]:
        variants = [mutated(ids, changes[item.number]) for item in items]
        return [{"score": np.array([pseudo_log_likelihood(model, variant)])} for variant in variants]

    def masked_rows(items: Sequence[Item]) -> list[Arrays]:
        rows = model.masked_log_probabilities(ids, [item.content for item in items])
        return [{"log_probabilities": row} for row in rows]

    def all_rows(items: Sequence[Item]) -> list[Arrays]:
        return [{"log_probabilities": model.blended_log_probabilities([ids])[0]} for _ in items]

    if method == "pseudo-perplexity":
        compute = pseudo_perplexities
        items = [Item(i, mutant_name(m), None, len(ids), pass_work * len(ids), 8) for i, m in mutants.items()]
    elif method == "masked-marginals":
        compute = masked_rows
        positions = sorted({position for change in changes.values() for position in change})
        items = [Item(p, f"position {p + 1}", p, len(ids), pass_work, row_bytes) for p in positions]
    else:
        compute = all_rows
        items = [Item(0, "wild type", None, len(ids), pass_work, row_bytes * len(ids))]
    settings = _settings(model.settings, ids, method)
    return Job(
        "score", settings, ItemList(items, _input(mutants)), compute, model.chunk_work, cause=lambda _: model.cause(ids)
    )


def _settings(of_model: dict[str, Any], ids: np.ndarray, method: str) -> dict[str, Any]:
    return of_model | {"method": method, "sequence": ids.tolist()}


def _input(mutants: dict[int, Mutant]) -> dict[str, str]:
    digest = hashlib.sha256(repr(sorted(mutants.items())).encode()).hexdigest()
    return {"name": "mutants", "sha256": digest}


def _differences(
    results: Sequence[Result], ids: np.ndarray, changes: dict[int, Change], method: str, vocabulary: Vocabulary
) -> dict[int, float]:
    """Return log p(mutant) − log p(wild type) of each mutant, summed over the tokens that it changes."""
    if method == "masked-marginals":
        table = {result.number: result.arrays["log_probabilities"] for result in results}
    else:
        table = dict(enumerate(results[0].arrays["log_probabilities"]))
    scores = {}
    for index, change in changes.items():
        gains = []
        for position, id in change.items():
            rows = np.stack([table[position]] * 2)
            mutant, wild_type = vocabulary.log_probability(rows, np.array([id, ids[position]]))
            gains.append(mutant - wild_type)
        scores[index] = float(sum(gains))
    return scores


def mutated(ids: np.ndarray, change: Change) -> np.ndarray:
    """Return the ids of a mutant, given those of the wild type."""
    ids = ids.copy()
    for position, id in change.items():
        ids[position] = id
    return ids


def residues_of(sequence: str) -> str:
    """Return the residues of a sequence, which may be one of pairs of residues and structure letters."""
    if not is_paired(sequence):
        return sequence
    pairs = Pairs().tokens(sequence)
    return "".join(pair[0].replace(UNKNOWN, "X") if len(pair) == 2 else pair for pair in pairs)


def _clean_wild_type(sequence: str, aligned: bool = False, report: Report | None = None) -> str:
    text = "".join(sequence.split())
    return (
        Pairs().clean(text, aligned, report) if is_paired(text) and not text.islower() else clean(text, aligned, report)
    )


def read_wild_type(
    sequence: str | os.PathLike[str], report: Report | None = None, structure: str | os.PathLike[str] | None = None
) -> str:
    """Clean a sequence, or read it from a FASTA file.

    Args:
        sequence: the sequence, or the path of a FASTA file.
        report: counts the letters that became X, or # in pairs.
        structure: a file of structure letters.

    Raises:
        UserError: neither a file nor a sequence; not exactly one protein; or a sequence with gaps, after which the
            numbers of the table would no longer match.
    """
    report = report or Report()
    report.strict = True
    if not os.path.exists(sequence):
        text = os.fspath(sequence)
        if isinstance(sequence, os.PathLike) or re.search(r"[/\\.]", text):
            raise UserError(f"File not found: {text}.")
        if structure is not None:
            raise UserError("The structure letters belong to an id: give the wild type as a FASTA file.")
        try:
            wild_type = _clean_wild_type(text, report=report)
        except UserError as error:
            raise UserError(f"{text!r} is neither a file nor a sequence: it {error}.") from None
    else:
        proteins = list(ProteinSource.open(sequence, structure=structure).read(report, clean=_clean_wild_type))
        if len(proteins) != 1:
            raise UserError(f"{sequence} contains {len(proteins)} proteins; must be only the wild type.")
        wild_type = proteins[0].sequence
    if report.gaps:
        raise UserError(f"The wild type has {report.gaps} gaps (- or .), which have no number. Remove them.")
    return wild_type


def _table(mutants: str | os.PathLike[str] | Sequence[str], column: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns and rows of a table of mutants, read from a file or made of a list."""
    if isinstance(mutants, (str, os.PathLike)):
        columns, rows = read_table(mutants, column)
        return columns, [dict(row) for row in rows]
    return [column], [{column: mutant} for mutant in mutants]


def _scan(wild_type: str, first_residue: int, letters: str) -> list[str]:
    """Return the mutants with each of the letters at each position."""
    places = enumerate(tokens(wild_type.replace(CHAIN_BREAK, "")), first_residue)
    return [f"{letter}{place}{to}" for place, letter in places for to in letters]


def _parse(
    rows: list[dict[str, Any]], column: str, wild_type: str, first_residue: int
) -> tuple[dict[int, Mutant], list[str]]:
    parsed: dict[int, Mutant] = {}
    left_out: list[str] = []
    for index, row in enumerate(rows):
        try:
            parsed[index] = parse(row[column], wild_type, first_residue)
        except UserError as error:
            left_out.append(f"row {index + 1}: {error}.")
    advice = ""
    if 2 * len(parsed) < len(rows):
        better = suggest_first_residue([row[column] for row in rows], wild_type)
        if better not in (None, first_residue):
            advice = f" More would match with --first-residue {better}."
    if rows and not parsed:
        raise UserError("\n".join([f"No mutant matches the sequence.{advice}", *left_out[:5]]))
    if advice:
        left_out.append(f"{len(left_out)} of {len(rows)} mutants.{advice}")
    return parsed, left_out


def _drop_residues(mutants: dict[int, Mutant], rows: list[dict[str, Any]], column: str, nucleotides: str) -> list[str]:
    """Remove the mutants with other letters than nucleotides. Return a message for each.

    Raises:
        UserError: none are left.
    """
    wrong = [i for i, mutant in mutants.items() if any(s.mutant not in nucleotides for s in mutant)]
    found = [f"row {i + 1}: {rows[i][column]}: a nucleotide must be one of {', '.join(nucleotides)}." for i in wrong]
    if wrong and len(wrong) == len(mutants):
        raise UserError("\n".join(["No mutant is one of DNA.", *found[:5]]))
    for i in wrong:
        del mutants[i]
    return found


def mutant_name(substitutions: Mutant) -> str:
    """Return the name of a mutant, such as A42G:L7P, with residues counted from 1."""
    return ":".join(f"{s.wild_type}{s.position + 1}{s.mutant}" for s in substitutions)


def pseudo_log_likelihood(model: ProteinModel, ids: np.ndarray) -> float:
    """Return the sum of log p over all residues, each masked in turn (Salazar et al. 2020, arXiv:1910.14659)."""
    places = np.flatnonzero(model.vocabulary.residue_mask(ids))
    rows = model.masked_log_probabilities(ids, places.tolist())
    return float(model.vocabulary.log_probability(rows, ids[places]).sum(dtype=np.float64))


def write_table(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV file; missing values are empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def scan_grid(scores: Scores, mutant_column: str = "mutant") -> tuple[np.ndarray, list[str], int]:
    """Return the last score column of a scan (`mutants=None`) as a grid.

    Returns:
        The scores [letters, positions], the wild type at each position, and the number of the first position.
    """
    values: dict[tuple[int, str], float] = {}
    wild_types: dict[int, str] = {}
    for row in scores.rows:
        mutant, value = row[mutant_column], row.get(scores.columns[-1])
        if value is not None:
            values[int(mutant[1:-1]), mutant[-1]] = value
            wild_types[int(mutant[1:-1])] = mutant[0]
    places = sorted(wild_types)
    grid = np.array([[values[place, letter] for place in places] for letter in scanned_letters(scores, mutant_column)])
    return grid, [wild_types[place] for place in places], places[0]


def scanned_letters(scores: Scores, mutant_column: str = "mutant") -> str:
    """Return the letters that a scan (`mutants=None`) has at each position, such as the 20 residues."""
    return "".join(dict.fromkeys(row[mutant_column][-1] for row in scores.rows))


def heat_map(scores: Scores, path: str | os.PathLike[str], mutant_column: str = "mutant") -> None:
    """Write the scores of a scan as a picture."""
    grid, wild_type, first_residue = scan_grid(scores, mutant_column)
    letters = scanned_letters(scores, mutant_column)
    plots.mutation_scan(grid, wild_type, letters, first_residue).savefig(path, dpi=plots.DPI)
