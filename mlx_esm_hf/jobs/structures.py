"""The files of a folded protein: PDB, mmCIF, the predicted aligned error, and pictures.

Each function makes a file from one result of `fold`. Chains are named from A, and the residues of each are numbered
from 1. Unknown residues (X) are UNK in the sequence and have no atoms.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator
from itertools import islice, product
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np

from mlx_esm_hf import plots
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.models.esmfold.protein import ONE_LETTER_CHAINS, pdb_text
from mlx_esm_hf.models.esmfold.residue_constants import ATOM37, ATOM37_MASK, RESIDUE_NAMES, RESTYPES_WITH_X
from mlx_esm_hf.runs.ids import FileNames
from mlx_esm_hf.runs.job import Result
from mlx_esm_hf.version import __version__

ALPHA = ATOM37.index("CA")
PDB_RESIDUES, PDB_ATOMS = 9_999, 99_999  # limits of the columns of a PDB file, for a chain and for the file
TITLE = 200  # characters of the id in the title of a file
UNQUOTED = r'[^ -~]|["\\]'
RESERVED = ("data_", "save_", "loop_", "stop_", "global_")


class Atom(NamedTuple):
    """An atom with its position in Å and its pLDDT from 0 to 100."""

    name: str
    position: np.ndarray
    plddt: float

    @property
    def element(self) -> str:
        """The symbol of its element."""
        return self.name[0]


class Residue(NamedTuple):
    """A residue, given by its letter, and its atoms."""

    letter: str
    atoms: list[Atom]

    @property
    def name(self) -> str:
        """Its three-letter name."""
        return RESIDUE_NAMES[RESTYPES_WITH_X.index(self.letter)]


def chain_names() -> Iterator[str]:
    """Yield A to Z, a to z, 0 to 9, then pairs of capital letters, triples and so on."""
    yield from ONE_LETTER_CHAINS
    for letters in itertools.count(2):
        yield from map("".join, product(ascii_uppercase, repeat=letters))


def chains_of(result: Result) -> dict[str, list[Residue]]:
    """Return the residues of each chain."""
    chains: dict[str, list[Residue]] = {}
    names = list(islice(chain_names(), int(result.arrays["chain_index"].max()) + 1))
    for place, chain in enumerate(result.arrays["chain_index"]):
        chains.setdefault(names[chain], []).append(residue_at(result, place))
    return chains


def residue_at(result: Result, place: int) -> Residue:
    """Return the residue at an index into the arrays of a result."""
    aatype, positions, plddt = (result.arrays[name] for name in ("aatype", "positions", "plddt"))
    atoms = np.flatnonzero(ATOM37_MASK[aatype[place]])
    return Residue(
        RESTYPES_WITH_X[aatype[place]],
        [Atom(ATOM37[atom], positions[place, atom], float(plddt[place, atom])) for atom in atoms],
    )


def alpha_plddt(result: Result) -> np.ndarray:
    """Return the pLDDT of each residue's Cα atom [L], 0 to 100; NaN for residues without atoms."""
    exists = ATOM37_MASK[result.arrays["aatype"]][:, ALPHA] > 0
    return np.where(exists, result.arrays["plddt"][:, ALPHA], np.nan).astype(np.float32)


def refuse_for_pdb(aatype: np.ndarray, chain_index: np.ndarray) -> None:
    """Refuse a protein that is too large for a PDB file.

    Raises:
        UserError: too many chains, residues or atoms.
    """
    lengths = np.bincount(chain_index)
    atoms = int(ATOM37_MASK[aatype].sum()) + len(lengths)  # the end of a chain has a number, as an atom has
    for count, most, what in (
        (len(lengths), len(ONE_LETTER_CHAINS), "chains"),
        (int(lengths.max()), PDB_RESIDUES, "residues in a chain"),
        (atoms, PDB_ATOMS, "atoms"),
    ):
        if count > most:
            raise UserError(f"has {count:,} {what}, but a PDB file has at most {most:,}: use mmCIF (--formats cif)")


def pdb(result: Result) -> bytes:
    """Return a PDB file; the B factor is each atom's pLDDT."""
    aatype, chain_index, positions, plddt = (
        result.arrays[name] for name in ("aatype", "chain_index", "positions", "plddt")
    )
    return pdb_text(aatype, chain_index, positions, ATOM37_MASK[aatype], plddt, title_of(result)).encode("ascii")


def title_of(result: Result) -> str:
    """Return the title of a file. Characters that the formats cannot contain or quote become `?`."""
    return f"{model_of(result)} prediction for {re.sub(UNQUOTED, '?', result.id[:TITLE])}"


def model_of(result: Result) -> str:
    """Return the name of the model that made a result."""
    return "ESMFold2" if "loops" in result.arrays else "ESMFold"


def entry_of(result: Result) -> str:
    """Return the id of an mmCIF file, which must not begin with a reserved word of the format."""
    name = result.name or FileNames().name(result.id)
    return f"_{name}" if name.lower().startswith(RESERVED) else name


def mmcif(result: Result) -> bytes:
    """Return a ModelCIF file: mmCIF with quality scores.

    It has the pLDDT of each residue and of the whole model, and each atom's pLDDT as its B factor.
    """
    import modelcif
    import modelcif.dumper
    import modelcif.model
    import modelcif.protocol

    system = modelcif.System(title=title_of(result), id=entry_of(result))
    software = software_of(model_of(result))
    chains = chains_of(result)
    entities: dict[str, Any] = {}  # one for all chains with the same sequence
    units = {}
    for name, residues in chains.items():
        sequence = "".join(residue.letter for residue in residues)
        if sequence not in entities:
            codes = ["UNK" if letter == "X" else letter for letter in sequence]
            entities[sequence] = modelcif.Entity(codes, description=f"protein of {len(codes)} residues")
        units[name] = modelcif.AsymUnit(entities[sequence], details=f"chain {name}", id=name, strand_id=name)
    system.entities.extend(entities.values())
    system.asym_units.extend(units.values())
    # A chain of nothing but X has no atoms. It is in the file, but must not be in the assembly of the model.
    modeled = [units[name] for name, residues in chains.items() if any(residue.atoms for residue in residues)]
    model = modelcif.model.AbInitioModel(modelcif.Assembly(modeled, name="all chains"), name=model_of(result))
    add_atoms(model, chains, units)
    add_quality(model, result, chains, units, software)
    system.model_groups.append(modelcif.model.ModelGroup([model], name="all models"))
    step = modelcif.protocol.ModelingStep(
        modelcif.data.DataGroup(entities.values()), model, name="folding", software=software
    )
    protocol = modelcif.protocol.Protocol()
    protocol.steps.append(step)
    system.protocols.append(protocol)
    file = io.StringIO()
    modelcif.dumper.write(file, [system])
    return file.getvalue().encode()


def software_of(model: str) -> Any:
    """Return this package as ModelCIF's software, with the paper of ESMFold as its citation.

    Args:
        model: "ESMFold" or "ESMFold2", which has no paper.
    """
    import ihm

    paper = ihm.Citation(
        pmid=None,
        title="Evolutionary-scale prediction of atomic-level protein structure with a language model",
        journal="Science",
        volume=379,
        page_range=(1123, 1130),
        year=2023,
        authors=["Lin, Z.", "Akin, H.", "Rao, R.", "Hie, B.", "Zhu, Z.", "Rives, A."],
        doi="10.1126/science.ade2574",
    )
    return ihm.Software(
        "mlx-esm-hf",
        "model building",
        f"{model} in MLX",
        None,
        type="package",
        version=__version__,
        citation=paper if model == "ESMFold" else None,
    )


def add_atoms(model: Any, chains: dict[str, list[Residue]], units: dict[str, Any]) -> None:
    """Add the atoms to a ModelCIF model, and list the residues without atoms."""
    from modelcif.model import Atom as ModelAtom
    from modelcif.model import NotModeledResidueRange

    for name, residues in chains.items():
        for number, residue in enumerate(residues, start=1):
            if not residue.atoms:
                model.not_modeled_residue_ranges.append(NotModeledResidueRange(units[name], number, number))
            for atom in residue.atoms:
                place = (float(x) for x in atom.position)
                made = ModelAtom(units[name], number, atom.name, atom.element, *place, biso=atom.plddt, occupancy=1.0)
                model.add_atom(made)


def add_quality(
    model: Any, result: Result, chains: dict[str, list[Residue]], units: dict[str, Any], software: Any
) -> None:
    """Add the quality scores to a ModelCIF model."""
    from modelcif import qa_metric

    scored_by = software

    # ModelCIF writes the docstrings of these classes into the file.
    class MeanPLDDT(qa_metric.Global, qa_metric.PLDDT):
        """mean pLDDT of the atoms"""  # noqa: D415

        name, software = "pLDDT", scored_by

    class PTM(qa_metric.Global, qa_metric.NormalizedScore):
        """predicted TM-score"""  # noqa: D415

        name, software = "pTM", scored_by

    class ResiduePLDDT(qa_metric.Local, qa_metric.PLDDT):
        """pLDDT of the CA atom"""  # noqa: D415

        name, software = "pLDDT", scored_by

    model.qa_metrics.append(MeanPLDDT(float(result.arrays["mean_plddt"][0])))
    model.qa_metrics.append(PTM(float(result.arrays["ptm"][0])))
    for name, residues in chains.items():
        for number, residue in enumerate(residues, start=1):
            for atom in residue.atoms:
                if atom.name == "CA":
                    model.qa_metrics.append(ResiduePLDDT(units[name].residue(number), atom.plddt))


def largest_error() -> float:
    """Return the largest predicted aligned error that the model can predict, in Å."""
    from mlx_esm_hf.models.esmfold.modeling_esmfold import aligned_error_centers

    return float(aligned_error_centers()[-1])


def aligned_error_json(result: Result) -> bytes:
    """Return the predicted aligned error as JSON in the layout of AlphaFold DB, rounded to whole Å."""
    error = np.rint(result.arrays["predicted_aligned_error"]).astype(int).tolist()
    largest = largest_error()
    layout = [{"predicted_aligned_error": error, "max_predicted_aligned_error": largest}]
    return json.dumps(layout, separators=(",", ":")).encode()


def confidence_npz(result: Result) -> bytes:
    """Return an `.npz` file with the confidence scores.

    Its arrays are `predicted_aligned_error` [L, L] in Å, `plddt` [L] of the Cα atoms, `chain_index` [L], `ptm` [1] and
    `mean_plddt` [1]; for ESMFold2 also `iptm` [1], `pair_chains_iptm` [chains, chains], and `sample_ptm` and
    `sample_iptm` of all samples.
    """
    names = ["predicted_aligned_error", "chain_index", "ptm", "mean_plddt"]
    names += [name for name in ("iptm", "pair_chains_iptm", "sample_ptm", "sample_iptm") if name in result.arrays]
    file = io.BytesIO()
    np.savez(file, plddt=alpha_plddt(result), **{name: result.arrays[name] for name in names})  # type: ignore[arg-type]
    return file.getvalue()


def chain_ends(result: Result) -> np.ndarray:
    """Return where one chain ends and the next begins, in residues counted from 1, such as 10.5."""
    return np.flatnonzero(np.diff(result.arrays["chain_index"])) + 1.5


def plddt_picture(result: Result) -> bytes:
    """Return pLDDT along the chains as PNG."""
    plddt = alpha_plddt(result)
    mean = np.nanmean(plddt) if np.isfinite(plddt).any() else np.nan
    title = f"{result.id[:60]}: mean pLDDT of Cα {mean:.1f}"
    return plots.png(plots.plddt_curve(plddt, chain_ends(result), title, chain_names=list(chains_of(result))))


def aligned_error_picture(result: Result) -> bytes:
    """Return the predicted aligned error as PNG."""
    title = f"{result.id[:60]}: pTM {result.arrays['ptm'][0]:.2f}"
    largest = largest_error()
    error = result.arrays["predicted_aligned_error"]
    return plots.png(
        plots.aligned_error(error, largest, chain_ends(result), title, chain_names=list(chains_of(result)))
    )
