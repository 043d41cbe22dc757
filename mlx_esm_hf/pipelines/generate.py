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
from mlx_esm_hf.models.auto import MLXAutoModelForMaskedLM
from mlx_esm_hf.pipelines.protein_job import ProteinJob
from mlx_esm_hf.pipelines.protein_model import ProteinModel, as_protein_model
from mlx_esm_hf.runs.job import Arrays, Item, OnProgress, Result, no_progress
from mlx_esm_hf.runs.outputs import check_outputs
from mlx_esm_hf.runs.run import Run

ORDERS = ("confidence", "left-to-right", "gibbs")


class Design(NamedTuple):
    """A new sequence, from which protein it was made, the how manieth, and the mean log p of what was drawn."""

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
            raise ValueError("temperature and top_k must not be negative, and top_p must be above 0 and at most 1.")

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
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not one of {', '.join(ORDERS)}.")
    if (proteins is None) == (length is None):
        raise ValueError("Either proteins or a length is needed, and not both.")
    if samples < 1 or sweeps < 0 or (length is not None and length < 1):
        raise ValueError("samples and length must be 1 at least, and sweeps must not be negative.")
    sampling = Sampling(temperature, top_k, top_p)
    kept = None if fixed is None else parse_positions(fixed)
    check_outputs(output, ("", ".fasta", ".fa"))
    protein_model = as_protein_model(MLXAutoModelForMaskedLM, model, output, loading)

    def free(ids: np.ndarray) -> np.ndarray:
        if kept is None:
            return np.flatnonzero(ids == protein_model.vocabulary.mask)
        return np.setdiff1d(np.arange(len(ids)), kept)

    def check(ids: np.ndarray) -> None:
        if kept is not None and len(kept) and kept.max() >= len(ids):
            raise ValueError(f"has {len(ids)} residues, and none at {kept.max() + 1}, which is to be kept")
        if not len(free(ids)):
            raise ValueError("has no free position: no <mask>, or all is kept")

    def compute(items: Sequence[Item]) -> list[Arrays]:
        drafts = [Draft(item.content, free(item.content), generator(item)) for item in items]
        fill(protein_model, drafts, order, sweeps, sampling)
        return [{"ids": draft.ids, "log_probability": np.array([draft.drawn.mean()])} for draft in drafts]

    def generator(item: Item) -> np.random.Generator:
        return np.random.default_rng([seed, zlib.crc32(item.content.tobytes()), item.number % samples])

    def size(residues: int) -> int:
        return 4 * residues + 8

    def work(tokens: int) -> int:
        passes = 1 + sweeps if order == "gibbs" else 1
        return passes * tokens * tokens

    def design(result: Result) -> Design:
        sequence = "".join(protein_model.vocabulary.decode(result.arrays["ids"]))
        return Design(result.id, result.number % samples + 1, sequence, float(result.arrays["log_probability"][0]))

    def write(path: Path, run: Run) -> None:
        write_fasta(path, map(design, run.results()))

    source: Source
    if proteins is not None:
        source, described = proteins, None
    else:
        source, described = [("design", "<mask>" * int(length or 0))], {"name": "length", "sha256": ""}
    job = ProteinJob(
        "generate",
        protein_model,
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
        compute,
        size,
        work,
        check,
        samples,
        described,  # of a length the settings say it all
        aligned,
        strict,
    )
    if output is None:
        return map(design, job.stream(source))
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


def fill(model: ProteinModel, drafts: Sequence[Draft], order: str, sweeps: int, sampling: Sampling) -> None:
    """Fill the free positions of all drafts side by side, one of each in a pass."""
    mask = model.vocabulary.mask
    standard = np.array([model.vocabulary.ids[residue] for residue in STANDARD])
    for draft in drafts:
        draft.ids[draft.free] = mask
    plans = [plan(draft, order, sweeps) for draft in drafts]
    for step in range(max(map(len, plans), default=0)):
        active = [(draft, places[step]) for draft, places in zip(drafts, plans, strict=True) if step < len(places)]
        if order != "confidence":
            for draft, place in active:
                draft.ids[draft.free[place]] = mask
        rows = model.blended_log_probabilities([draft.ids for draft, _ in active])
        for (draft, place), row in zip(active, rows, strict=True):
            answers = row[draft.free][:, standard]
            if order == "confidence":
                place = np.where(draft.ids[draft.free] == mask, answers.max(axis=1), -np.inf).argmax()
            residue = sampling.draw(answers[place], draft.random)
            draft.ids[draft.free[place]] = standard[residue]
            draft.drawn[place] = answers[place, residue]


def plan(draft: Draft, order: str, sweeps: int) -> np.ndarray:
    """Which free position is filled in each pass; with "confidence" only their number counts."""
    count = len(draft.free)
    if order == "gibbs":
        return np.concatenate([draft.random.permutation(count) for _ in range(1 + sweeps)])
    return np.arange(count)


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
            raise ValueError(f"{text!r} is no list of positions, such as 1-10,25.")
        found.update(range(first - 1, last))
    return np.array(sorted(found))
