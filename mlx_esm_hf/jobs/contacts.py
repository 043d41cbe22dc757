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

from mlx_esm_hf import plots
from mlx_esm_hf.data.proteins import Protein, Report, Source, is_stream, read_proteins, tokens
from mlx_esm_hf.data.windows import Window, ramp
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.jobs.protein_job import ProteinJob, Room, WriteRun
from mlx_esm_hf.jobs.protein_model import ProteinModel, as_protein_model
from mlx_esm_hf.models.auto import MLXAutoModel
from mlx_esm_hf.runs.formats import write_npz
from mlx_esm_hf.runs.job import Arrays, Item, OnProgress, Result, no_progress
from mlx_esm_hf.runs.outputs import check_outputs, check_picture
from mlx_esm_hf.runs.run import Run
from mlx_esm_hf.runtime.costs import costs

SEPARATION = 6  # residues between the partners of a contact, at least (Rao et al. 2020, 3.1)
RANGES = {"all": (6, None), "short": (6, 12), "medium": (12, 24), "long": (24, None)}
DISTANCE = 8.0  # Å between Cβ atoms
ATTENTIONS = 512  # tokens of a batch at most: attention maps grow with the square


def contacts(
    proteins: Source,
    model: str | ProteinModel,
    output: str | os.PathLike[str] | None = None,
    *,
    top: str | os.PathLike[str] | None = None,
    picture: str | os.PathLike[str] | None = None,
    structure: str | os.PathLike[str] | None = None,
    chain: str | None = None,
    aligned: bool = False,
    strict: bool = False,
    progress: OnProgress = no_progress,
    **loading: Any,
) -> Iterator[Result] | Report:
    """The probabilities that two residues of a protein touch (Cβ atoms closer than 8 Å).

    Args:
        proteins: see `read_proteins`.
        model: one with a trained contact head; ESM-1v has none.
        output: `.npz`, a map for each id; `.csv`, the list of `top_contacts`; or a folder of shards.
        top: with an `.npz` output, write the list of `top_contacts` to this CSV file, too.
        picture: draw the map of the file's only protein (`.png`, `.svg`, `.pdf`); the output has to be `.npz`.
        structure, chain: for the picture, see `known_contacts`.
        loading: see `load`. With `long="window"` the probability of two residues that share no window is 0.

    A protein whose maps would not fit into the memory that is free is left out, as others that cannot be read.

    Returns:
        See `embed`; the array is `contacts`, [residues, residues].
    """
    _check_others(output, top, picture, structure, chain)
    check_outputs(output, FORMATS, picture, top)
    protein = None if picture is None else _only_protein(proteins, output, aligned)
    known = None if protein is None or structure is None else known_contacts(structure, protein.sequence, chain)
    protein_model = as_protein_model(MLXAutoModel, model, output, loading)
    check_head(protein_model)
    protein_model = replace(protein_model, batch_tokens=min(protein_model.batch_tokens, ATTENTIONS))
    room = Room(output, lambda ids: bytes_needed(protein_model, len(ids)))

    def compute(items: Sequence[Item]) -> list[Arrays]:
        room.confirm(items)
        return maps(protein_model, [item.content for item in items])

    def size(residues: int) -> int:
        return 4 * residues**2

    def write_picture(path: Path, run: Run) -> None:
        (result,) = run.results()
        draw(result.arrays["contacts"], path, result.id, known)

    others: dict[Path, WriteRun] = {}
    if picture is not None:
        others[Path(picture)] = write_picture
    if top is not None:
        others[Path(top)] = write_top_contacts
    settings = {"memory": room.mebibytes}
    job = ProteinJob(
        "contacts", protein_model, settings, compute, size, check=room.check, arrays=1, aligned=aligned, strict=strict
    )
    if output is None:
        return job.stream(proteins)
    return job.write(proteins, Path(output), FORMATS, progress, others)


def _check_others(output: Any, top: Any, picture: Any, structure: Any, chain: str | None) -> None:
    """
    Raises:
        ValueError: files beside the output that do not go with it or with each other.
    """
    if chain is not None and structure is None:
        raise UserError("A chain is one of a structure: which?")
    if structure is not None and picture is None:
        raise UserError("A structure is for the picture: where should that go?")
    if top is not None and (output is None or Path(output).suffix != ".npz"):
        raise UserError(
            "A list of top contacts beside the output needs an .npz output; --output TOP.csv writes it alone."
        )
    check_picture(picture)


def _only_protein(proteins: Source, output: str | os.PathLike[str] | None, aligned: bool) -> Protein:
    """The protein whose map is drawn."""
    is_file = isinstance(proteins, (str, os.PathLike)) and not is_stream(proteins)
    if output is None or Path(output).suffix != ".npz" or not is_file:
        raise UserError("A picture needs a FASTA file and an .npz output.")
    found = list(read_proteins(proteins, aligned))
    if len(found) != 1:
        raise UserError(f"A picture is of one protein; {proteins} holds {len(found)}.")
    return found[0]


def check_head(model: ProteinModel) -> None:
    """
    Raises:
        ValueError: the model cannot predict contacts, or its checkpoint had no weights for that.
    """
    if not hasattr(model.network, "predict_contacts"):
        raise UserError(
            f"{model.name or 'This model'} has no contact head: a {type(model.network).__name__} does not predict "
            "contacts. Take ESM-1b or ESM-2."
        )
    model.network.base_model.refuse_untrained("contact_head", "contact prediction")


def bytes_needed(model: ProteinModel, residues: int) -> int:
    """An upper bound of the memory that the contacts of a protein take: the attention maps of one layer in each step of
    its computation (6.6 of them at most were measured, in plain MLX), and what is made of the maps of all residues."""
    window = model.windows(0, residues)[0].length + model.vocabulary.around
    return 4 * (7 * model.network.config.num_attention_heads * window**2 + 12 * residues**2)


def maps(model: ProteinModel, sequences: Sequence[np.ndarray]) -> list[Arrays]:
    """The contact maps of sequences of ids."""
    totals = [np.zeros((len(ids), len(ids)), np.float32) for ids in sequences]
    weights: dict[int, np.ndarray] = {}  # of the proteins in several windows
    launch = costs().contact_launch_pairs
    # Attention maps have padding, too, even where other batches are packed.
    for batch in model.batches(sequences, row_cost=lambda tokens: tokens**2 / launch):
        predicted = np.array(model.network.predict_contacts(batch.input_ids, batch.attention_mask).astype(mx.float32))
        for window, one in zip(batch.windows, predicted, strict=True):
            index, size = window.sequence, window.length
            square = (slice(window.start, window.stop),) * 2
            if size == len(sequences[index]):
                totals[index][square] = one[:size, :size]
                continue
            weight = _pair_weights(window, len(sequences[index]))
            totals[index][square] += weight * one[:size, :size]
            weights.setdefault(index, np.zeros_like(totals[index]))[square] += weight
    for index, weight in weights.items():
        totals[index] /= np.where(weight > 0, weight, 1)
    return [{"contacts": total} for total in totals]


def _pair_weights(window: Window, length: int) -> np.ndarray:
    weight = ramp(window, length)
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
    """A row for each of the `top_contacts` of each protein."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["number", "id", "i", "j", "probability"])
        for result in run.results():
            for i, j, probability in top_contacts(result.arrays["contacts"]):
                table.writerow([result.number, result.id, i, j, f"{probability:.6f}"])


FORMATS: dict[str, WriteRun | None] = {"": None, ".npz": write_npz, ".csv": write_top_contacts}


# A known structure


def known_contacts(structure: str | os.PathLike[str], sequence: str, chain: str | None = None) -> np.ndarray:
    """Which residues touch in a PDB or mmCIF file: [residues, residues], 1, 0, and NaN where the structure has none.

    The chain is aligned to the sequence, so its numbering does not matter.

    Args:
        chain: its id; by default the one that aligns best.

    Raises:
        ValueError: not a structure, no such chain, or no protein in it.
    """
    chains = structure_chains(structure)
    if chain is not None:
        if chain not in [one.id for one in chains]:
            raise UserError(f"{structure} has no chain {chain!r}, but {', '.join(one.id for one in chains)}.")
        chains = [one for one in chains if one.id == chain]
    alignments = [best for one in chains if (best := align_chain(one, sequence)) is not None]
    if not alignments:
        raise UserError(f"{structure} has no residues of a protein{'' if chain is None else f' in chain {chain!r}'}.")
    alignment, residues = max(alignments, key=lambda pair: pair[0].score)
    coordinates = np.full((len(tokens(sequence)), 3), np.nan)
    for (start, stop), (first, _) in zip(*alignment.aligned, strict=True):
        for k in range(stop - start):
            residue = residues[first + k]
            coordinates[start + k] = residue["CB" if "CB" in residue else "CA"].coord
    distances = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=-1)
    return np.where(np.isnan(distances), np.nan, distances < DISTANCE)


def structure_chains(structure: str | os.PathLike[str]) -> list[Any]:
    """The chains of the first model in a PDB or mmCIF file, as Biopython has them.

    Raises:
        ValueError: it is not a structure.
    """
    from Bio.PDB import MMCIFParser, PDBParser
    from Bio.PDB.PDBExceptions import PDBConstructionException

    parser: Any = (MMCIFParser if Path(structure).suffix.lower() in (".cif", ".mmcif") else PDBParser)(QUIET=True)
    try:
        return next(iter(parser.get_structure("", os.fspath(structure)))).get_list()
    except (StopIteration, KeyError, ValueError, PDBConstructionException) as error:
        raise UserError(
            f"{structure} is no PDB or mmCIF file with atoms in it ({type(error).__name__}: {error})."
        ) from error


def align_chain(chain: Any, sequence: str) -> tuple[Any, list[Any]] | None:
    """The best alignment of a sequence to the residues of a chain that have a Cβ or Cα atom, and those residues; None
    if there are none."""
    from Bio.Align import PairwiseAligner
    from Bio.PDB.Polypeptide import is_aa
    from Bio.SeqUtils import seq1

    residues = [residue for residue in chain if is_aa(residue, standard=False) and ("CB" in residue or "CA" in residue)]
    if not residues:
        return None
    aligner = PairwiseAligner(mode="global", match_score=2, mismatch_score=-1, open_gap_score=-5, extend_gap_score=-0.1)
    aligner.end_gap_score = 0
    ours = "".join(token if len(token) == 1 else "X" for token in tokens(sequence))
    theirs = "".join(seq1(residue.get_resname(), undef_code="X") for residue in residues)
    return aligner.align(ours, theirs)[0], residues


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
    """Write the map as a picture, with the known contacts and the precision if there is a structure."""
    top: list[tuple[int, int, float]] = []
    if known is not None:
        top = top_contacts(np.where(np.isnan(known), -1, probabilities))
        at_l = precision(probabilities, known)
        title += f"\nprecision of the top L: {at_l['all']:.2f}, long range {at_l['long']:.2f}"
    plots.contact_map(probabilities, known, top, title).savefig(path, dpi=plots.DPI)
