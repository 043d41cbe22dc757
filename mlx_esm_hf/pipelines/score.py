"""Effects of mutations without training on them (Meier et al. 2021, doi:10.1101/2021.07.09.450648)."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_esm_hf import MLXEsmForMaskedLM
from mlx_esm_hf.data.proteins import STANDARD, clean, read_proteins, tokens
from mlx_esm_hf.pipelines.model import Loaded, as_loaded
from mlx_esm_hf.pipelines.mutations import Substitution, parse, read_table, suggest_first_residue
from mlx_esm_hf.runs.formats import check_picture, write_whole
from mlx_esm_hf.runs.job import Progress, check_output, no_progress
from mlx_esm_hf.runs.run import Arrays, Item, Run, discard, shards_of, stream, wait_for_all

METHODS = ("masked-marginals", "wt-marginals", "pseudo-perplexity")


class Scores(NamedTuple):
    """The table with a score column for each model; what was not scored, and why."""

    columns: list[str]
    rows: list[dict[str, Any]]
    left_out: list[str]


def score(
    mutants: str | os.PathLike[str] | Sequence[str] | None,
    sequence: str | os.PathLike[str],
    model: str | Loaded | Sequence[str | Loaded],
    output: str | os.PathLike[str] | None = None,
    *,
    method: str = "masked-marginals",
    mutant_column: str = "mutant",
    first_residue: int = 1,
    picture: str | os.PathLike[str] | None = None,
    progress: Progress = no_progress,
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
        raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}.")
    if picture is not None and mutants is not None:
        raise ValueError("A heat map is of all mutations: leave out the list of mutants.")
    if picture is not None:
        check_picture(picture)
    check_output(output, [".csv"])
    wild_type = read_wild_type(sequence)
    columns, rows = _table(mutants, mutant_column, wild_type, first_residue)
    parsed, left_out = _parse(rows, mutant_column, wild_type, first_residue)

    models = [model] if isinstance(model, (str, os.PathLike, Loaded)) else list(model)
    names = [m.name if isinstance(m, Loaded) else str(m) for m in models]
    called = [*columns, *names, *["mean"] * (len(names) > 1)]
    if repeated := [name for name in called if called.count(name) > 1]:
        raise ValueError(f"Two columns would be called {repeated[0]!r}.")
    folder = None if output is None else shards_of(output)
    unread: dict[int, str] = {}
    for number, (name, one) in enumerate(zip(names, models, strict=True), 1):
        part = None if folder is None else folder / str(number)
        loaded = as_loaded(MLXEsmForMaskedLM, one, part, loading)
        ids, fitting = _fit(loaded, wild_type, parsed)
        unread |= {i: f"row {i + 1}: {name} reads {len(ids)} residues." for i in parsed.keys() - fitting.keys()}
        for index, value in _scores(loaded, ids, fitting, method, part, progress).items():
            rows[index][name] = value
    columns = called
    if len(names) > 1:
        for row in rows:
            if all(name in row for name in names):
                row["mean"] = float(np.mean([row[name] for name in names]))
    scores = Scores(columns, rows, [*left_out, *unread.values()])
    if output is not None and folder is not None and mx.distributed.init().rank() == 0:
        if picture is not None:
            write_whole(Path(picture), lambda part: heat_map(scores, part, mutant_column))
        write_whole(Path(output), lambda part: write_table(part, columns, rows))
        discard(folder)
    elif output is None and picture is not None:
        heat_map(scores, picture, mutant_column)
    wait_for_all()
    return scores


def _fit(
    loaded: Loaded, wild_type: str, mutants: dict[int, list[Substitution]]
) -> tuple[np.ndarray, dict[int, list[Substitution]]]:
    """The ids that this model reads of the wild type, and the mutants within them."""
    try:
        ids = loaded.fit(loaded.ids(wild_type))
    except ValueError as error:
        raise ValueError(f"The wild type {error}.") from None
    return ids, {i: m for i, m in mutants.items() if all(s.position < len(ids) for s in m)}


def read_wild_type(sequence: str | os.PathLike[str]) -> str:
    """A sequence, or that of the FASTA file with this name."""
    if not os.path.exists(sequence):
        text = os.fspath(sequence)
        try:
            return clean(text)
        except ValueError as error:
            raise ValueError(f"{text!r} is neither a file nor a sequence: it {error}.") from None
    proteins = list(read_proteins(sequence))
    if len(proteins) != 1:
        raise ValueError(f"{sequence} holds {len(proteins)} proteins; the wild type has to be the only one.")
    return proteins[0].sequence


def _table(
    mutants: str | os.PathLike[str] | Sequence[str] | None, column: str, wild_type: str, first_residue: int
) -> tuple[list[str], list[dict[str, Any]]]:
    if mutants is None:
        places = enumerate(tokens(wild_type), first_residue)
        return [column], [{column: f"{residue}{place}{to}"} for place, residue in places for to in STANDARD]
    if isinstance(mutants, (str, os.PathLike)):
        columns, rows = read_table(mutants, column)
        return columns, [dict(row) for row in rows]
    return [column], [{column: mutant} for mutant in mutants]


def _parse(
    rows: list[dict[str, Any]], column: str, wild_type: str, first_residue: int
) -> tuple[dict[int, list[Substitution]], list[str]]:
    parsed, left_out = {}, []
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
        raise ValueError("\n".join([f"No mutation fits the sequence.{advice}", *left_out[:5]]))
    if advice:
        left_out.append(f"{len(left_out)} of {len(rows)} mutations.{advice}")
    return parsed, left_out


def _scores(
    loaded: Loaded,
    ids: np.ndarray,
    mutants: dict[int, list[Substitution]],
    method: str,
    folder: Path | None,
    progress: Progress,
) -> dict[int, float]:
    """The score of each mutant, from a run of its own."""
    vocabulary = loaded.vocabulary
    work = sum(span.stop - span.start for span in loaded.spans(0, len(ids)))
    row_bytes = 4 * loaded.model.config.vocab_size

    if method == "pseudo-perplexity":

        def compute(items: Sequence[Item]) -> list[Arrays]:
            return [{"score": np.array([pseudo_log_likelihood(loaded, mutated(ids, item.content))])} for item in items]

        def mutated(ids: np.ndarray, substitutions: list[Substitution]) -> np.ndarray:
            ids = ids.copy()
            for substitution in substitutions:
                ids[substitution.position] = vocabulary[substitution.mutant]
            return ids

        items = [Item(i, mutant_name(m), m, len(ids), work * len(ids), 8) for i, m in mutants.items()]
    elif method == "masked-marginals":
        positions = sorted({s.position for substitutions in mutants.values() for s in substitutions})
        items = [Item(position, str(position + 1), position, len(ids), work, row_bytes) for position in positions]

        def compute(items: Sequence[Item]) -> list[Arrays]:
            rows = loaded.masked_log_probabilities(ids, [item.content for item in items])
            return [{"log_probabilities": row} for row in rows]
    else:
        items = [Item(0, "wild type", None, len(ids), work, row_bytes * len(ids))]

        def compute(items: Sequence[Item]) -> list[Arrays]:
            return [{"log_probabilities": loaded.blended_log_probabilities([ids])[0]}]

    total = sum(item.length for item in items)
    settings = {"method": method, "sequence": ids.tolist()}
    digest = hashlib.sha256(repr(sorted(mutants.items())).encode()).hexdigest()
    run = Run(folder, "score", loaded.settings | settings, {"name": "mutants", "sha256": digest}) if folder else None
    if run and not run.complete:
        run.compute(items, loaded.batch_tokens, compute, progress, total)
    if run and not run.first_rank:
        return {}
    found = list(run.records() if run else stream(items, loaded.batch_tokens, compute))
    if method == "pseudo-perplexity":
        return {record.number: float(record.arrays["score"][0]) for record in found}
    if method == "masked-marginals":
        table = {record.number: record.arrays["log_probabilities"] for record in found}
    else:
        table = dict(enumerate(found[0].arrays["log_probabilities"])) if found else {}
    return {
        index: float(
            sum(table[s.position][vocabulary[s.mutant]] - table[s.position][vocabulary[s.wild_type]] for s in m)
        )
        for index, m in mutants.items()
    }


def mutant_name(substitutions: Sequence[Substitution]) -> str:
    return ":".join(f"{s.wild_type}{s.position + 1}{s.mutant}" for s in substitutions)


def pseudo_log_likelihood(loaded: Loaded, ids: np.ndarray) -> float:
    """The sum of log p over all positions, each masked in turn (Salazar et al. 2020, arXiv:1910.14659)."""
    rows = loaded.masked_log_probabilities(ids, range(len(ids)))
    return float(rows[np.arange(len(ids)), ids].sum(dtype=np.float64))


def write_table(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def heat_map(scores: Scores, path: str | os.PathLike[str], mutant_column: str = "mutant") -> None:
    """The scores of all 20 residues at each position as a picture (of what `score` returns without a list)."""
    from matplotlib.figure import Figure

    values: dict[tuple[int, str], float] = {}
    wild_types: dict[int, str] = {}
    for row in scores.rows:
        mutant, value = row[mutant_column], row.get(scores.columns[-1])
        if value is not None:
            values[int(mutant[1:-1]), mutant[-1]] = value
            wild_types[int(mutant[1:-1])] = mutant[0]
    places = sorted(wild_types)
    grid = np.array([[values[place, residue] for place in places] for residue in STANDARD])
    figure = Figure(figsize=(max(6, len(places) / 8), 5), layout="constrained")
    axes = figure.subplots()
    bound = np.abs(grid).max() or 1
    image = axes.imshow(grid, cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto")
    axes.set_yticks(range(20), list(STANDARD))
    step = max(1, len(places) // 60)
    axes.set_xticks(
        range(0, len(places), step), [f"{wild_types[p]}{p}" for p in places[::step]], rotation=90, fontsize=7
    )
    axes.set_xlabel("wild type and position")
    axes.set_ylabel("mutant")
    figure.colorbar(image, label="log p(mutant) - log p(wild type)")
    figure.savefig(path, dpi=150)
