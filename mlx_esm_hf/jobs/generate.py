"""New sequences: masks filled one after the other, or every free position drawn again and again."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_esm_hf.data.proteins import STANDARD, Report, Source
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.jobs.protein_job import ProteinJob
from mlx_esm_hf.jobs.protein_model import ProteinModel, as_protein_model
from mlx_esm_hf.models.auto import MLXAutoModelForMaskedLM
from mlx_esm_hf.runs.job import Arrays, Item, OnProgress, Result, no_progress
from mlx_esm_hf.runs.outputs import check_outputs
from mlx_esm_hf.runs.run import Run

ORDERS = ("confidence", "left-to-right", "gibbs")


class Design(NamedTuple):
    """A new sequence: the id of its protein, the number of the sample, and the mean log p of what was drawn."""

    id: str
    sample: int
    sequence: str
    log_probability: float


@dataclass
class Sampling:
    """How a residue is drawn from log-probabilities: among the 20 standard ones.

    Args:
        temperature: 0 takes the most probable.
        top_k: only among so many of the most probable.
        top_p: only among the most probable that together have this probability (Holtzman et al. 2020).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError("temperature and top_k must not be negative, and top_p must be above 0 and at most 1.")

    def draw(self, log_probabilities: np.ndarray, random: np.random.Generator) -> int:
        """An index into log-probabilities [20]."""
        order = np.argsort(-log_probabilities, kind="stable")
        if self.temperature == 0:
            return int(order[0])
        scaled = log_probabilities[order].astype(np.float64) / self.temperature
        p = np.exp(scaled - scaled[0])
        if self.top_k:
            p[self.top_k :] = 0
        p /= p.sum()
        p[1:][np.cumsum(p)[:-1] >= self.top_p] = 0
        return int(order[random.choice(len(p), p=p / p.sum())])


@dataclass
class Plan:
    """Which positions are filled, and when.

    Args:
        order: "confidence", "left-to-right" or "gibbs"; see `generate`.
        sweeps: how often "gibbs" draws each position anew.
        samples: designs for each protein.
        seed: of what is random.
        kept: residues that stay as they are, all others being free; None, the masks are free.
    """

    order: str
    sweeps: int
    samples: int
    seed: int
    kept: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise UserError(f"order={self.order!r} is not one of {', '.join(ORDERS)}.")
        if self.samples < 1 or self.sweeps < 0:
            raise UserError("samples must be 1 at least, and sweeps must not be negative.")

    def free(self, ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """The positions of a sequence of ids that are to be filled."""
        if self.kept is None:
            return np.flatnonzero(ids == vocabulary.mask)
        return np.delete(np.flatnonzero(vocabulary.residues(ids)), self.kept)

    def random(self, item: Item) -> np.random.Generator:
        """The same for a sample of a protein, whatever else is computed beside it."""
        return np.random.default_rng([self.seed, zlib.crc32(item.content.tobytes()), item.number % self.samples])

    def places(self, draft: Draft) -> np.ndarray:
        """Which free position is filled in each pass; with "confidence" only their number counts."""
        count = len(draft.free)
        if self.order == "gibbs":
            return np.concatenate([draft.random.permutation(count) for _ in range(1 + self.sweeps)])
        return np.arange(count)

    def work(self, tokens: int) -> int:
        """Tokens that go through the model for a window of so many: a pass for each of them, in each sweep."""
        return (1 + self.sweeps if self.order == "gibbs" else 1) * tokens * tokens


def generate(
    proteins: Source | None,
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
    progress: OnProgress = no_progress,
    **loading: Any,
) -> Iterator[Design] | Report:
    """Design sequences: fill the masked positions of proteins, or a number of masks.

    "left-to-right" fills masks in this order, "confidence" always the one that the model is surest of. "gibbs" fills
    them in random order and then draws each free position anew, masked, `sweeps` times over, in random orders (Wang
    and Cho 2019, arXiv:1902.04094). One position a pass in all of them.

    Args:
        proteins: see `read_proteins`; None with a length.
        output: a FASTA file (`.fasta`, `.fa`), or a folder of shards.
        length: residues of a design from nothing.
        samples: designs for each protein.
        fixed: positions to keep, such as "1-10,25"; all others are free. By default the masks are free.
        temperature, top_k, top_p: see `Sampling`.
        seed: equal seeds give equal designs of equal proteins, whatever else is computed beside them.
        loading: see `load`.

    Returns:
        Without an output an iterator over `Design`.
    """
    if (proteins is None) == (length is None):
        raise UserError("Either proteins or a length is needed, and not both.")
    if length is not None and length < 1:
        raise UserError("length must be 1 at least.")
    plan = Plan(order, sweeps, samples, seed, None if fixed is None else parse_positions(fixed))
    sampling = Sampling(temperature, top_k, top_p)
    check_outputs(output, ("", ".fasta", ".fa"))
    designer = Designer(as_protein_model(MLXAutoModelForMaskedLM, model, output, loading), plan, sampling)
    job = ProteinJob(
        "generate",
        designer.model,
        {
            "length": length,
            "samples": samples,
            "order": order,
            "sweeps": sweeps,
            "fixed": fixed,
            "seed": seed,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        },
        designer.compute,
        size=lambda residues: 4 * residues + 8,
        work=plan.work,
        check=designer.check,
        copies=samples,
        input=None if proteins is not None else {"name": "length", "sha256": ""},  # of a length the settings say it all
        aligned=aligned,
        strict=strict,
    )
    source: Source = [("design", "<mask>" * int(length or 0))] if proteins is None else proteins
    if output is None:
        return map(designer.design, job.stream(source))
    write = designer.write
    return job.write(source, Path(output), {"": None, ".fasta": write, ".fa": write}, progress)


def write_fasta(path: Path, designs: Iterable[Design]) -> None:
    """A record for each design, called by the protein's id and the number of the sample."""
    with open(path, "w", encoding="utf-8") as file:
        for d in designs:
            file.write(f">{d.id}_{d.sample} mean_log_p={d.log_probability:.4f}\n{d.sequence}\n")


class Draft:
    """A sequence of ids in the making: free positions are masked until they are filled."""

    def __init__(self, ids: np.ndarray, free: np.ndarray, random: np.random.Generator):
        self.ids, self.free, self.random = ids.copy(), free, random
        self.drawn = np.zeros(len(free))  # log p of what stands at each free position


class Designer:
    """A model that fills the free positions of proteins.

    Args:
        plan: which positions are filled, and when.
        sampling: how residues are drawn.
    """

    def __init__(self, model: ProteinModel, plan: Plan, sampling: Sampling):
        self.model, self.plan, self.sampling = model, plan, sampling
        self.mask = model.vocabulary.mask
        self.standard = np.array([model.vocabulary.ids[residue] for residue in STANDARD])

    def check(self, ids: np.ndarray) -> None:
        """
        Raises:
            ValueError: there is nothing to fill, or a position to be kept that the protein does not have.
        """
        kept, residues = self.plan.kept, self.model.vocabulary.residues(ids).sum()
        if kept is not None and len(kept) and kept.max() >= residues:
            raise UserError(f"has {residues} residues, and none at {kept.max() + 1}, which is to be kept")
        if not len(self.plan.free(ids, self.model.vocabulary)):
            raise UserError("has no free position: no <mask>, or all is kept")

    def compute(self, items: Sequence[Item]) -> list[Arrays]:
        """The results of proteins: `ids` [residues], and `log_probability` [1], the mean log p of what was drawn."""
        vocabulary = self.model.vocabulary
        drafts = [
            Draft(item.content, self.plan.free(item.content, vocabulary), self.plan.random(item)) for item in items
        ]
        self.fill(drafts)
        return [{"ids": draft.ids, "log_probability": np.array([draft.drawn.mean()])} for draft in drafts]

    def fill(self, drafts: Sequence[Draft]) -> None:
        """Fill the free positions of all drafts side by side, one of each in a pass."""
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
                residue = self.sampling.draw(answers[place], draft.random)
                draft.ids[draft.free[place]] = self.standard[residue]
                draft.drawn[place] = answers[place, residue]

    def design(self, result: Result) -> Design:
        """What is handed out of a result."""
        sequence = "".join(self.model.vocabulary.decode(result.arrays["ids"]))
        sample = result.number % self.plan.samples + 1
        return Design(result.id, sample, sequence, float(result.arrays["log_probability"][0]))

    def write(self, path: Path, run: Run) -> None:
        """Write the designs of a run as FASTA."""
        write_fasta(path, map(self.design, run.results()))


def parse_positions(text: str) -> np.ndarray:
    """Positions from 0 of a list from 1, such as "1-10,25".

    Raises:
        ValueError: not such a list.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise UserError(f"{text!r} is no list of positions, such as 1-10,25.")
        found.update(range(first - 1, last))
    return np.array(sorted(found))
