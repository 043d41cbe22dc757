"""Contacts between residues, predicted from attention (Rao et al. 2020, doi:10.1101/2020.12.15.422761)."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import mlx.core as mx
import numpy as np

from mlx_esm_hf import plots
from mlx_esm_hf.data.proteins import Protein, Report, tokens
from mlx_esm_hf.data.source import Proteins, ProteinSource, check_file
from mlx_esm_hf.data.vocabulary import refuse_other_sequences
from mlx_esm_hf.data.windows import Window, ramp
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.jobs.protein_job import MemoryLimit, ProteinItems, load_checked, run_job
from mlx_esm_hf.jobs.protein_model import ProteinModel, as_protein_model, check_loading
from mlx_esm_hf.runs.formats import write_maps
from mlx_esm_hf.runs.job import Arrays, Item, Job, OnProgress, Result, no_progress
from mlx_esm_hf.runs.outputs import check_outputs, check_picture
from mlx_esm_hf.runs.run import Run, WriteRun
from mlx_esm_hf.runtime.costs import costs

SEPARATION = 6  # least distance of the two residues of a contact in the sequence (Rao et al. 2020, section 3.1)
RANGES = {"all": (6, None), "short": (6, 12), "medium": (12, 24), "long": (24, None)}
DISTANCE = 8.0  # Å between Cβ atoms
ATTENTION_TOKENS = 512  # maximum tokens of a batch: attention maps grow with the square of the length


@overload
def contacts(
    proteins: Proteins, model: str | ProteinModel, output: None = None, **options: Any
) -> Iterator[Result]: ...


@overload
def contacts(
    proteins: Proteins, model: str | ProteinModel, output: str | os.PathLike[str], **options: Any
) -> Report: ...


def contacts(
    proteins: Proteins,
    model: str | ProteinModel,
    output: str | os.PathLike[str] | None = None,
    *,
    top: str | os.PathLike[str] | None = None,
    picture: str | os.PathLike[str] | None = None,
    structure: str | os.PathLike[str] | None = None,
    chain: str | None = None,
    aligned: bool = False,
    strict: bool = False,
    progress: OnProgress | bool = no_progress,
    **loading: Any,
) -> Iterator[Result] | Report:
    """Predict the probabilities that two residues of a protein are in contact (Cβ atoms closer than 8 Å).

    A protein whose maps do not fit into free memory is left out.

    Args:
        proteins: see `read_proteins`.
        model: a Hub repository, a folder, or the result of `load_protein_model`. It needs a trained contact head, which
            ESM-1v lacks.
        output: `.npz` for a map of each protein; `.csv` for the list of `top_contacts`; or a folder of shards; None to
            stream the results.
        top: also write the list of `top_contacts` to this CSV file. Needs an `.npz` output.
        picture: draw the map of the file's only protein (`.png`, `.svg`, `.pdf`). Needs an `.npz` output.
        structure: a PDB or mmCIF file whose contacts are drawn in the picture; see `known_contacts`.
        chain: its chain; None for the one that aligns best.
        aligned: keep gaps.
        strict: raise an error for a bad record instead of leaving it out.
        progress: called after each step; True shows a progress bar.
        loading: see `load_protein_model`. With `long="window"`, two residues that share no window have probability 0.

    Returns:
        See `embed`. The array is `contacts` [residues, residues].

    Raises:
        UserError: the model has no contact head, options or files do not fit together, the proteins cannot be read, or
            the output cannot be written.

    Example:
        >>> for result in contacts(["MKTAYIAKQR"], "facebook/esm2_t6_8M_UR50D"):
        ...     result.arrays["contacts"].shape
        (10, 10)
    """
    check_loading(model, **loading)
    _check_others(output, top, picture, structure, chain)
    source = ProteinSource.open(proteins, aligned)
    check_outputs(output, FORMATS, picture, top)
    protein = None if picture is None else _only_protein(source, output)
    known = None if protein is None or structure is None else known_contacts(structure, protein.sequence, chain)
    from mlx_esm_hf.models.auto import MLXAutoModel

    protein_model = as_protein_model(MLXAutoModel, model, output, loading)
    refuse_other_sequences(protein_model.vocabulary, "contacts")
    check_contact_class(protein_model)

    def compute(items: Sequence[Item]) -> list[Arrays]:
        limit.confirm(items)
        return maps(protein_model, [item.content for item in items])

    def result_bytes(positions: int) -> int:
        return 4 * positions**2

    def write_picture(path: Path, run: Run) -> None:
        (result,) = run.results()
        draw(result.arrays["contacts"], path, result.id, known)

    others: dict[Path, WriteRun] = {}
    if picture is not None:
        others[Path(picture)] = write_picture
    if top is not None:
        others[Path(top)] = write_top_contacts
    items = ProteinItems(source, protein_model, result_bytes, output, strict=strict)
    load_checked(protein_model, "contacts", {"aligned": aligned}, items, output, progress)
    check_head(protein_model)
    protein_model = replace(protein_model, batch_tokens=min(protein_model.batch_tokens, ATTENTION_TOKENS))
    limit = MemoryLimit(output, lambda ids: bytes_needed(protein_model, len(ids)))
    items.add_check(limit.check)
    settings = protein_model.settings | {"memory": limit.mebibytes, "aligned": aligned}
    job = Job("contacts", settings, items, compute, protein_model.chunk_work, cause=protein_model.cause)
    return run_job(job, items, output, FORMATS, progress, others)


def _check_others(output: Any, top: Any, picture: Any, structure: Any, chain: str | None) -> None:
    """Refuse files that do not fit together.

    Raises:
        UserError: a chain without a structure, a structure without a picture, or a list without an `.npz` output.
    """
    if chain is not None and structure is None:
        raise UserError("chain needs a structure. Pass the PDB or mmCIF file as structure.")
    if structure is not None and picture is None:
        raise UserError("structure needs a picture to draw its contacts in. Pass the name of a picture.")
    if top is not None and (output is None or Path(output).suffix != ".npz"):
        raise UserError("top needs an .npz output. To write only the list of top contacts, use --output TOP.csv.")
    check_picture(picture)
    if structure is not None:
        check_file(structure, "a PDB or mmCIF file")


def _only_protein(source: ProteinSource, output: str | os.PathLike[str] | None) -> Protein:
    """Return the protein whose map is drawn.

    Raises:
        UserError: the source is not a file with one protein, or the output is not `.npz`.
    """
    if output is None or Path(output).suffix != ".npz" or not source.can_reread:
        raise UserError("A picture needs a FASTA file and an .npz output.")
    found = list(source.read())
    if len(found) != 1:
        raise UserError(f"A picture needs exactly one protein, but {source.path} contains {len(found)}.")
    return found[0]


def check_head(model: ProteinModel) -> None:
    """Check that a model can predict contacts.

    Raises:
        UserError: the model has no contact head, or its checkpoint has no weights for it.
    """
    check_contact_class(model)
    try:
        model.network.base_model.refuse_untrained("contact_head", "contact prediction")
    except UserError as error:
        raise UserError(
            f"{error} Masked language modelling does not train it. The published ESM-1b and ESM-2 have one, such as "
            "facebook/esm2_t33_650M_UR50D."
        ) from None


def check_contact_class(model: ProteinModel) -> None:
    """Check that models of this class predict contacts.

    Raises:
        UserError: they do not.
    """
    if not hasattr(model.model_class, "predict_contacts"):
        raise UserError(
            f"{model.name or 'This model'} has no contact head: a {model.model_class.__name__} does not predict "
            "contacts. Use ESM-1b or ESM-2."
        )


def bytes_needed(model: ProteinModel, residues: int) -> int:
    """Return an upper bound of the bytes that predicting the contacts of a protein needs.

    It counts the attention maps of one layer in the steps of their computation (at most 6.6 copies were measured, in
    plain MLX), and the arrays computed from the maps of all residues.
    """
    window = model.windows(0, residues)[0].length + model.vocabulary.around
    return 4 * (7 * model.network.config.num_attention_heads * window**2 + 12 * residues**2)


def maps(model: ProteinModel, sequences: Sequence[np.ndarray]) -> list[Arrays]:
    """Return the contact maps of proteins, given by their ids [positions]."""
    totals = [np.zeros((len(ids), len(ids)), np.float32) for ids in sequences]
    weights: dict[int, np.ndarray] = {}  # for proteins in several windows
    launch = costs().contact_launch_pairs
    # Attention maps include padding even if batches are packed otherwise.
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
    """Return the most probable contacts (i, j, probability), with residues counted from 1.

    Args:
        probabilities: a contact map [residues, residues].
        count: number of contacts; None for as many as there are residues.
        separation: least distance of i and j.
    """
    i, j = np.triu_indices(len(probabilities), separation)
    order = np.argsort(-probabilities[i, j], kind="stable")[: len(probabilities) if count is None else count]
    return [(int(i[k]) + 1, int(j[k]) + 1, float(probabilities[i[k], j[k]])) for k in order]


def write_top_contacts(path: Path, run: Run) -> None:
    """Write a CSV file with a row for each of the `top_contacts` of each protein."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["number", "id", "i", "j", "probability"])
        for result in run.results():
            for i, j, probability in top_contacts(result.arrays["contacts"]):
                table.writerow([result.number, result.id, i, j, f"{probability:.6f}"])


FORMATS: dict[str, WriteRun | None] = {"": None, ".npz": write_maps, ".csv": write_top_contacts}


# A known structure


def known_contacts(structure: str | os.PathLike[str], sequence: str, chain: str | None = None) -> np.ndarray:
    """Return which residues of a protein are in contact in a PDB or mmCIF file.

    The chain is aligned to the sequence, so its numbering does not matter.

    Args:
        structure: the file.
        sequence: the cleaned sequence of the protein.
        chain: id of a chain; None for the one that aligns best.

    Returns:
        [residues, residues]: 1 for contacts, 0 for others, NaN for residues that are missing in the structure.

    Raises:
        UserError: the file is not a structure, or it has no such chain or no protein.
    """
    chains = structure_chains(structure)
    if chain is not None:
        if chain not in [one.id for one in chains]:
            raise UserError(
                f"Chain {chain!r} not found in {structure} (chains: {', '.join(one.id for one in chains)})."
            )
        chains = [one for one in chains if one.id == chain]
    alignments = [best for one in chains if (best := align_chain(one, sequence)) is not None]
    if not alignments:
        raise UserError(f"{structure} contains no protein{'' if chain is None else f' in chain {chain!r}'}.")
    alignment, residues = max(alignments, key=lambda pair: pair[0].score)
    coordinates = np.full((len(tokens(sequence)), 3), np.nan)
    for (start, stop), (first, _) in zip(*alignment.aligned, strict=True):
        for k in range(stop - start):
            residue = residues[first + k]
            coordinates[start + k] = residue["CB" if "CB" in residue else "CA"].coord
    distances = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=-1)
    return np.where(np.isnan(distances), np.nan, distances < DISTANCE)


def structure_chains(structure: str | os.PathLike[str]) -> list[Any]:
    """Read the chains of the first model in a PDB or mmCIF file, as Biopython objects.

    Raises:
        UserError: the file is not a structure.
    """
    from Bio.PDB import MMCIFParser, PDBParser
    from Bio.PDB.PDBExceptions import PDBConstructionException

    parser: Any = (MMCIFParser if Path(structure).suffix.lower() in (".cif", ".mmcif") else PDBParser)(QUIET=True)
    try:
        return next(iter(parser.get_structure("", os.fspath(structure)))).get_list()
    except (StopIteration, KeyError, ValueError, PDBConstructionException) as error:
        raise UserError(
            f"{structure} is not a PDB or mmCIF file with atoms ({type(error).__name__}: {error})."
        ) from error


def align_chain(chain: Any, sequence: str) -> tuple[Any, list[Any]] | None:
    """Align a sequence to the residues of a chain that have a Cβ or Cα atom.

    Returns:
        The best alignment and those residues; None if there are none.
    """
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
    """Return the precision of the most probable contacts for each range of separations.

    Pairs that are missing in the structure are left out.

    Args:
        probabilities: the predicted map [residues, residues].
        known: see `known_contacts`.
        fraction: number of contacts, as a fraction of the length: 1 for P@L, 0.2 for P@L/5.

    Returns:
        {range: precision}; NaN for a range without pairs.
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
