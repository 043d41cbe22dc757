"""New sequences: masks filled one at a time, or free positions redrawn by Gibbs sampling."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from mlx_esm_hf.checks import (
    MOST_LENGTH,
    MOST_SAMPLES,
    MOST_SEED,
    MOST_SWEEPS,
    check_choice,
    check_integer,
    check_number,
)
from mlx_esm_hf.data.proteins import STANDARD, Report
from mlx_esm_hf.data.source import Proteins, ProteinSource
from mlx_esm_hf.data.vocabulary import Vocabulary, refuse_other_sequences
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.jobs.protein_job import ProteinItems, load_checked, run_job
from mlx_esm_hf.jobs.protein_model import ProteinModel, as_protein_model, check_loading
from mlx_esm_hf.runs.job import Arrays, Item, Job, OnProgress, Result, no_progress
from mlx_esm_hf.runs.outputs import check_outputs
from mlx_esm_hf.runs.run import Run

ORDERS = ("confidence", "left-to-right", "gibbs")


class Design(NamedTuple):
    """A new sequence.

    Attributes:
        id: id of its protein.
        sample: number of the sample, from 1.
        sequence: the sequence.
        log_probability: mean log p of the residues that were drawn.
    """

    id: str
    sample: int
    sequence: str
    log_probability: float


@dataclass
class Sampling:
    """How one of the 20 standard residues is drawn from log-probabilities.

    Args:
        temperature: 0 takes the most probable residue.
        top_k: draw among this many of the most probable residues; 0 for all.
        top_p: draw among the most probable residues that together have this probability (Holtzman et al. 2020).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0)
        check_integer("top_k", self.top_k, 0)
        check_number("top_p", self.top_p, above=0, high=1)

    def draw(self, log_probabilities: np.ndarray, rng: np.random.Generator) -> int:
        """Draw an index into log-probabilities [20]."""
        order = np.argsort(-log_probabilities, kind="stable")
        if self.temperature == 0:
            return int(order[0])
        scaled = log_probabilities[order].astype(np.float64) / self.temperature
        p = np.exp(scaled - scaled[0])
        if self.top_k:
            p[self.top_k :] = 0
        p /= p.sum()
        p[1:][np.cumsum(p)[:-1] >= self.top_p] = 0
        return int(order[rng.choice(len(p), p=p / p.sum())])


@dataclass
class Plan:
    """Which positions are filled, and in which order.

    Args:
        order: "confidence", "left-to-right" or "gibbs"; see `generate`.
        sweeps: how often "gibbs" redraws each position.
        samples: designs for each protein.
        seed: seed of the random generators.
        kept: residues to keep, counted from 0; all others are free. None if the masks are free.
    """

    order: str
    sweeps: int
    samples: int
    seed: int
    kept: np.ndarray | None = None

    def __post_init__(self) -> None:
        check_choice("order", self.order, ORDERS)
        check_integer("samples", self.samples, 1, MOST_SAMPLES)
        check_integer("sweeps", self.sweeps, 0, MOST_SWEEPS)
        check_integer("seed", self.seed, 0, MOST_SEED)

    def free(self, ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Return the positions of ids to be filled."""
        if self.kept is None:
            return np.flatnonzero(ids == vocabulary.mask)
        return np.delete(np.flatnonzero(vocabulary.residue_mask(ids)), self.kept)

    def rng(self, item: Item) -> np.random.Generator:
        """Return the random generator of a sample of a protein, which does not depend on the other proteins."""
        return np.random.default_rng([self.seed, zlib.crc32(item.content.tobytes()), item.number % self.samples])

    def places(self, draft: Draft) -> np.ndarray:
        """Return which free position is filled in each pass; "confidence" uses only their number."""
        count = len(draft.free)
        if self.order == "gibbs":
            return np.concatenate([draft.rng.permutation(count) for _ in range(1 + self.sweeps)])
        return np.arange(count)

    def work(self, window_tokens: int) -> int:
        """Return the tokens that go through the model for a window: a pass for each token, in each sweep."""
        return (1 + self.sweeps if self.order == "gibbs" else 1) * window_tokens**2


@overload
def generate(
    proteins: Proteins | None, model: str | ProteinModel, output: None = None, **options: Any
) -> Iterator[Design]: ...


@overload
def generate(
    proteins: Proteins | None, model: str | ProteinModel, output: str | os.PathLike[str], **options: Any
) -> Report: ...


def generate(
    proteins: Proteins | None,
    model: str | ProteinModel,
    output: str | os.PathLike[str] | None = None,
    *,
    length: int | None = None,
    samples: int = 1,
    order: str = "confidence",
    sweeps: int = 10,
    fixed: str | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    aligned: bool = False,
    strict: bool = False,
    progress: OnProgress | bool = no_progress,
    **loading: Any,
) -> Iterator[Design] | Report:
    """Design sequences: fill the masked positions of proteins, or design sequences of a given length.

    Each pass fills one position of each protein.

    Args:
        proteins: see `read_proteins`; None with a length.
        model: a Hub repository, a folder, or the result of `load_protein_model`.
        output: a `.fasta` or `.fa` file, or a folder of shards; None to stream the designs.
        length: residues of a design without a template.
        samples: designs for each protein.
        order: "left-to-right" fills the masks in this order; "confidence" fills the mask with the most confident
            prediction first; "gibbs" fills them in random order, then masks and redraws each free position `sweeps`
            times in random order.
        sweeps: how often "gibbs" redraws each position.
        fixed: positions to keep, such as "1-10,25"; all others are free. None if the masks are free.
        temperature: see `Sampling`.
        top_k: see `Sampling`.
        top_p: see `Sampling`.
        seed: the same seed gives the same designs of a protein, whatever the other proteins.
        aligned: keep gaps.
        strict: raise an error for a bad record instead of leaving it out.
        progress: called after each step; True shows a progress bar.
        loading: see `load_protein_model`.

    Returns:
        Without an output, an iterator over `Design`. With an output, a report of what was changed and left out.

    Raises:
        UserError: an option has an unknown value, the proteins cannot be read, or the output cannot be written.

    Source: Wang and Cho 2019, arXiv:1902.04094, for Gibbs sampling.

    Example:
        >>> for design in generate(["MKT<mask><mask>AKQR"], "facebook/esm2_t6_8M_UR50D", samples=2):
        ...     design.sequence
    """
    if (proteins is None) == (length is None):
        raise UserError("Give a FASTA with `<mask>` or `--length N`, not both.")
    plan = Plan(order, sweeps, samples, seed, None if fixed is None else parse_positions(fixed))
    sampling = Sampling(temperature, top_k, top_p)
    check_loading(model, **loading)
    if length is not None:
        check_integer("length", length, 1, MOST_LENGTH)
        design = ("design", "<mask>" * length)
        source = ProteinSource("length", objects=[design], resumable=True, aligned=aligned)
    else:
        assert proteins is not None
        source = ProteinSource.open(proteins, aligned)
    check_outputs(output, ("", ".fasta", ".fa"))
    from mlx_esm_hf.models.auto import MLXAutoModelForMaskedLM

    protein_model = as_protein_model(MLXAutoModelForMaskedLM, model, output, loading)
    refuse_other_sequences(protein_model.vocabulary, "generate")
    designer = Designer(protein_model, plan, sampling)
    items = ProteinItems(
        source,
        protein_model,
        lambda positions: 4 * positions + 8,
        output,
        work=plan.work,
        check=designer.check,
        lacks="<mask>" if fixed is None else "",
        copies=samples,
        strict=strict,
    )
    settings = {
        "length": length,
        "samples": samples,
        "order": order,
        "sweeps": sweeps,
        "fixed": fixed,
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "aligned": aligned,
    }
    settings = load_checked(protein_model, "generate", settings, items, output, progress)
    job = Job(
        "generate",
        settings,
        items,
        designer.compute,
        protein_model.chunk_work,
        columns=designer.columns,
        cause=protein_model.cause,
    )
    writers = {"": None, ".fasta": designer.write, ".fa": designer.write}
    results = run_job(job, items, output, writers, progress)
    return results if isinstance(results, Report) else map(designer.design, results)


def write_fasta(path: Path, designs: Iterable[Design]) -> None:
    """Write a FASTA record for each design, named by the protein's id and the number of the sample."""
    with open(path, "w", encoding="utf-8") as file:
        for d in designs:
            file.write(f">{d.id}_{d.sample} mean_log_p={d.log_probability:.4f}\n{d.sequence}\n")


class Draft:
    """An unfinished design.

    Attributes:
        ids: ids [positions]; free positions are masked until they are filled.
        free: the free positions.
        rng: its random generator.
        drawn: log p of the residue at each free position.
    """

    def __init__(self, ids: np.ndarray, free: np.ndarray, rng: np.random.Generator) -> None:
        self.ids, self.free, self.rng = ids.copy(), free, rng
        self.drawn = np.zeros(len(free))


class Designer:
    """A model that fills the free positions of proteins.

    Args:
        model: the model.
        plan: which positions are filled, and in which order.
        sampling: how residues are drawn.
    """

    def __init__(self, model: ProteinModel, plan: Plan, sampling: Sampling) -> None:
        self.model, self.plan, self.sampling = model, plan, sampling
        self.mask = model.vocabulary.mask
        self.standard = np.array([model.vocabulary.ids[residue] for residue in STANDARD])

    def check(self, ids: np.ndarray) -> None:
        """Refuse a protein that cannot be filled.

        Raises:
            UserError: the protein has no free position, or lacks a position to keep.
        """
        kept, num_residues = self.plan.kept, self.model.num_residues(ids)
        if kept is not None and len(kept) and kept.max() >= num_residues:
            raise UserError(
                f"has {num_residues} residues, so position {kept.max() + 1} of the fixed ones does not exist"
            )
        if not len(self.plan.free(ids, self.model.vocabulary)):
            raise UserError("has no <mask>" if kept is None else "has no free position: all are fixed")

    def compute(self, items: Sequence[Item]) -> list[Arrays]:
        """Return the arrays of each item: `ids` [positions] and `log_probability` [1], the mean log p of the draws."""
        vocabulary = self.model.vocabulary
        drafts = [Draft(item.content, self.plan.free(item.content, vocabulary), self.plan.rng(item)) for item in items]
        self.fill(drafts)
        return [{"ids": draft.ids, "log_probability": np.array([draft.drawn.mean()])} for draft in drafts]

    def fill(self, drafts: Sequence[Draft]) -> None:
        """Fill the free positions of all drafts together, one position of each draft in a pass."""
        by_confidence = self.plan.order == "confidence"
        for draft in drafts:
            draft.ids[draft.free] = self.mask
        orders = [self.plan.places(draft) for draft in drafts]
        for step in range(max(map(len, orders), default=0)):
            active = [(draft, places[step]) for draft, places in zip(drafts, orders, strict=True) if step < len(places)]
            if not by_confidence:
                for draft, place in active:
                    draft.ids[draft.free[place]] = self.mask
            rows = self.model.blended_log_probabilities([draft.ids for draft, _ in active])
            for (draft, place), row in zip(active, rows, strict=True):
                answers = row[draft.free][:, self.standard]
                if by_confidence:
                    masked = draft.ids[draft.free] == self.mask
                    place = np.where(masked, answers.max(axis=1), -np.inf).argmax()
                residue = self.sampling.draw(answers[place], draft.rng)
                draft.ids[draft.free[place]] = self.standard[residue]
                draft.drawn[place] = answers[place, residue]

    def sample(self, result: Result) -> int:
        """Return the number of a result's sample, from 1."""
        return result.number % self.plan.samples + 1

    def columns(self, result: Result) -> dict[str, Any]:
        """Return the columns of a design in `index.csv`."""
        return {"sample": self.sample(result)}

    def design(self, result: Result) -> Design:
        """Return the design of a result."""
        sequence = "".join(self.model.vocabulary.decode(result.arrays["ids"]))
        return Design(result.id, self.sample(result), sequence, float(result.arrays["log_probability"][0]))

    def write(self, path: Path, run: Run) -> None:
        """Write the designs of a run as FASTA."""
        write_fasta(path, map(self.design, run.results()))


def parse_positions(text: str) -> np.ndarray:
    """Parse positions counted from 1, such as "1-10,25", and return them counted from 0.

    Raises:
        UserError: the text does not have this form.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise UserError(f"{text!r} is not a list of positions. Expected one such as 1-10,25.")
        found.update(range(first - 1, last))
    return np.array(sorted(found))
