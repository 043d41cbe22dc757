"""Contacts between residues, from attention (Rao et al. 2020, doi:10.1101/2020.12.15.422761)."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_esm_hf import MLXEsmModel
from mlx_esm_hf.data.proteins import Protein, Report, Source, is_stdin, read_proteins, tokens
from mlx_esm_hf.pipelines.model import Loaded, Span, as_loaded, ramp
from mlx_esm_hf.runs.formats import check_picture, require, write_npz, write_whole
from mlx_esm_hf.runs.job import Cost, Job, Progress, check_output, no_progress
from mlx_esm_hf.runs.run import Arrays, Record, Run

SEPARATION = 6  # residues between the partners of a contact, at least (Rao et al. 2020, 3.1)
RANGES = {"all": (6, None), "short": (6, 12), "medium": (12, 24), "long": (24, None)}
DISTANCE = 8.0  # Å between Cβ atoms
ATTENTIONS = 512  # tokens of a batch at most: attention maps of all layers are kept, and grow with the square


def contacts(
    proteins: Source,
    model: str | Loaded,
    output: str | os.PathLike[str] | None = None,
    *,
    top: str | os.PathLike[str] | None = None,
    picture: str | os.PathLike[str] | None = None,
    structure: str | os.PathLike[str] | None = None,
    chain: str | None = None,
    aligned: bool = False,
    strict: bool = False,
    progress: Progress = no_progress,
    **loading: Any,
) -> Iterator[Record] | Report:
    """The probabilities that two residues of a protein touch (Cβ atoms closer than 8 Å).

    Args:
        proteins: see `read_proteins`.
        model: one with a trained contact head; ESM-1v has none.
        output: `.npz`, a map for each id; `.csv`, the list of `top_contacts`; or a folder of shards.
        top: with an `.npz` output, write the list of `top_contacts` to this CSV file, too.
        picture: draw the map of the file's only protein (`.png`, `.svg`, `.pdf`); the output has to be `.npz`.
        structure, chain: for the picture, see `known_contacts`.
        loading: see `load`. With `long="window"` the probability of two residues that share no window is 0.

    Returns:
        See `embed`; the array is `contacts`, [residues, residues].
    """
    if chain is not None and structure is None:
        raise ValueError("A chain is one of a structure: which?")
    if top is not None:
        require(top)
    if top is not None and (output is None or Path(output).suffix != ".npz"):
        raise ValueError(
            "A list of top contacts beside the output needs an .npz output; --output TOP.csv writes it alone."
        )
    protein = None
    if picture is not None:
        check_picture(picture)
        protein = _only_protein(proteins, output, aligned)
    elif structure is not None:
        raise ValueError("A structure is for the picture: where should that go?")
    known = None if protein is None or structure is None else known_contacts(structure, protein.sequence, chain)

    def write(path: Path, run: Run) -> None:
        write_npz(path, run)
        if protein is not None and picture is not None:
            (record,) = run.records()
            write_whole(Path(picture), lambda part: draw(record.arrays["contacts"], part, record.id, known))
        if top is not None:
            write_whole(Path(top), lambda part: write_top_contacts(part, run))

    formats = {"": None, ".npz": write, ".csv": write_top_contacts}
    check_output(output, formats)
    loaded = as_loaded(MLXEsmModel, model, output, loading)
    loaded.model.base_model.refuse_untrained("contact_head", "contact prediction")
    loaded = replace(loaded, batch_tokens=min(loaded.batch_tokens, ATTENTIONS))
    job = Job(
        "contacts",
        loaded,
        {},
        lambda items: maps(loaded, [item.content for item in items]),
        Cost(lambda tokens: tokens, lambda residues: 4 * residues**2),
        formats,
        aligned=aligned,
        strict=strict,
    )
    return job.run(proteins, output, progress)


def _only_protein(proteins: Source, output: str | os.PathLike[str] | None, aligned: bool) -> Protein:
    if (
        output is None
        or Path(output).suffix != ".npz"
        or is_stdin(proteins)
        or not isinstance(proteins, (str, os.PathLike))
    ):
        raise ValueError("A picture needs a FASTA file and an .npz output.")
    found = list(read_proteins(proteins, aligned))
    if len(found) != 1:
        raise ValueError(f"A picture is of one protein; {proteins} holds {len(found)}.")
    return found[0]


def maps(loaded: Loaded, sequences: Sequence[np.ndarray]) -> list[Arrays]:
    """The contact maps of sequences of ids."""
    totals = [np.zeros((len(ids), len(ids)), np.float32) for ids in sequences]
    weights: dict[int, np.ndarray] = {}
    spans = [loaded.spans(item, len(ids)) for item, ids in enumerate(sequences)]
    for batch in loaded.forwards(sequences, [span for group in spans for span in group]):
        predicted = np.array(loaded.model.predict_contacts(batch.input_ids, batch.attention_mask).astype(mx.float32))
        for span, one in zip(batch.spans, predicted, strict=True):
            size = span.stop - span.start
            window = (slice(span.start, span.stop),) * 2
            if len(spans[span.item]) == 1:
                totals[span.item][window] = one[:size, :size]
                continue
            weight = _pair_weights(span, len(sequences[span.item]))
            totals[span.item][window] += weight * one[:size, :size]
            weights.setdefault(span.item, np.zeros_like(totals[span.item]))[window] += weight
    for item, weight in weights.items():
        totals[item] /= np.where(weight > 0, weight, 1)
    return [{"contacts": total} for total in totals]


def _pair_weights(span: Span, length: int) -> np.ndarray:
    weight = ramp(span, length)
    return np.minimum(weight[:, None], weight[None, :])


def top_contacts(
    probabilities: np.ndarray, count: int | None = None, separation: int = SEPARATION
) -> list[tuple[int, int, float]]:
    """The most probable contacts (i, j, probability), residues counted from 1, at least `separation` apart.

    Args:
        count: as many as there are residues, if None.
    """
    i, j = np.triu_indices(len(probabilities), separation)
    order = np.argsort(-probabilities[i, j], kind="stable")[: len(probabilities) if count is None else count]
    return [(int(i[k]) + 1, int(j[k]) + 1, float(probabilities[i[k], j[k]])) for k in order]


def write_top_contacts(path: Path, run: Run) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["record", "id", "i", "j", "probability"])
        for record in run.records():
            for i, j, probability in top_contacts(record.arrays["contacts"]):
                table.writerow([record.number, record.id, i, j, f"{probability:.6f}"])


# A known structure


def known_contacts(structure: str | os.PathLike[str], sequence: str, chain: str | None = None) -> np.ndarray:
    """Which residues touch in a PDB or mmCIF file: [residues, residues], 1, 0, and NaN where the structure has none.

    The chain is aligned to the sequence, so its numbering does not matter.

    Args:
        chain: its id; by default the one that aligns best.

    Raises:
        ValueError: not a structure, no such chain, or no protein in it.
    """
    from Bio.Align import PairwiseAligner
    from Bio.PDB import MMCIFParser, PDBParser
    from Bio.PDB.PDBExceptions import PDBConstructionException
    from Bio.PDB.Polypeptide import is_aa
    from Bio.SeqUtils import seq1

    parser: Any = (MMCIFParser if Path(structure).suffix.lower() in (".cif", ".mmcif") else PDBParser)(QUIET=True)
    try:
        chains = next(iter(parser.get_structure("", os.fspath(structure)))).get_list()
    except (StopIteration, KeyError, ValueError, PDBConstructionException) as error:
        raise ValueError(f"{structure} is no PDB or mmCIF file with atoms in it ({error!r}).") from error
    if chain is not None and chain not in [c.id for c in chains]:
        raise ValueError(f"{structure} has no chain {chain!r}, but {', '.join(c.id for c in chains)}.")
    residues = "".join(token if len(token) == 1 else "X" for token in tokens(sequence))
    aligner = PairwiseAligner(mode="global", match_score=2, mismatch_score=-1, open_gap_score=-5, extend_gap_score=-0.1)
    aligner.end_gap_score = 0
    best: Any = None
    for one in chains:
        if chain is not None and one.id != chain:
            continue
        atoms = [residue for residue in one if is_aa(residue, standard=False) and ("CB" in residue or "CA" in residue)]
        if not atoms:
            continue
        letters = "".join(seq1(residue.get_resname(), undef_code="X") for residue in atoms)
        alignment = aligner.align(residues, letters)[0]
        if best is None or alignment.score > best[0]:
            best = alignment.score, alignment, atoms
    if best is None:
        raise ValueError(f"{structure} has no residues of a protein{'' if chain is None else f' in chain {chain!r}'}.")
    coordinates = np.full((len(residues), 3), np.nan)
    for (start, stop), (first, _) in zip(*best[1].aligned, strict=True):
        for k in range(stop - start):
            residue = best[2][first + k]
            coordinates[start + k] = residue["CB" if "CB" in residue else "CA"].coord
    distances = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=-1)
    return np.where(np.isnan(distances), np.nan, distances < DISTANCE)


def precision(probabilities: np.ndarray, known: np.ndarray, fraction: float = 1.0) -> dict[str, float]:
    """The share of true contacts among the most probable L x fraction, in each range of separations (P@L, P@L/5).

    Pairs of which the structure does not know are left out; NaN where a range has no pairs.
    """
    found = {}
    length = len(probabilities)
    i, j = np.triu_indices(length, 1)
    for name, (low, high) in RANGES.items():
        pairs = (j - i >= low) & (j - i < (high or length)) & ~np.isnan(known[i, j])
        order = np.argsort(-probabilities[i, j][pairs], kind="stable")[: max(1, round(length * fraction))]
        found[name] = float(known[i, j][pairs][order].mean()) if pairs.any() else float("nan")
    return found


def draw(
    probabilities: np.ndarray, path: str | os.PathLike[str], title: str = "", known: np.ndarray | None = None
) -> None:
    """The map, and below the diagonal the known contacts with the precision, if there are any."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5.5), layout="constrained")
    axes = figure.subplots()
    ends = (0.5, len(probabilities) + 0.5)
    image = axes.imshow(probabilities, cmap="Blues", vmin=0, vmax=1, origin="lower", extent=(*ends, *ends))
    if known is not None:
        i, j = np.nonzero(np.tril(np.nan_to_num(known), -SEPARATION))
        axes.scatter(j + 1, i + 1, s=4, color="tab:red", label="known contacts (above: predicted)")
        axes.legend(loc="upper left", fontsize=8)
        at_l = precision(probabilities, known)
        title += f"\nprecision of the top L: {at_l['all']:.2f}, long range {at_l['long']:.2f}"
    axes.set_title(title.strip(), fontsize=10)
    axes.set_xlabel("residue")
    axes.set_ylabel("residue")
    figure.colorbar(image, label="probability of a contact")
    figure.savefig(path, dpi=150)
