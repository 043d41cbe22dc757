"""What another precision gains and costs: memory and speed, and how near its answers are to those of the original.

Each of the two models runs in a process of its own, one after the other, so that there is one in memory at a time, and
the peak is its own. The process reads a `Task` from standard input and writes its answers into a folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_esm_hf.data.proteins import STANDARD
from mlx_esm_hf.errors import UserRuntimeError
from mlx_esm_hf.jobs.contacts import check_head, maps, top_contacts
from mlx_esm_hf.jobs.embed import embed
from mlx_esm_hf.jobs.perplexity import counted_ids
from mlx_esm_hf.jobs.protein_model import ProteinModel, load_protein_model
from mlx_esm_hf.models import auto
from mlx_esm_hf.runs.job import Arrays
from mlx_esm_hf.runtime.device import device_name
from mlx_esm_hf.runtime.memory import peak_memory

Row = tuple[str, ...]  # what, before, after
Figures = dict[str, Any]  # for JSON

EVERY = 8  # of so many residues one is masked: as many as in training, about
SCANNED = 128  # residues of the protein whose mutations are scanned, at most
MAPPED, MAPS = 512, 20  # residues of a protein whose contacts are compared, and how many are: maps take long
TOP = {"L/5": 0.2, "L/2": 0.5, "L": 1.0}  # how many contacts of a protein with L residues
# transformers imports torch where it is installed, which would count as memory of the model.
PROCESS = "import sys; sys.modules['torch'] = None; from mlx_esm_hf.quantization import report; report.main()"
STATES, ANSWERS, MEASURED = "residues.f32", "answers.npz", "measured.json"


class Task(NamedTuple):
    """A model, by the name of its class in `models.auto`, and the proteins that it is shown."""

    cls: str
    model: str
    revision: str
    device: str
    proteins: list[str]
    folder: str  # for the answers


def compare(cls: Any, before: str, after: str, revision: str, proteins: Sequence[str]) -> Figures:
    """Run two checkpoints on the same proteins, and compare.

    A protein beyond the position table is seen in windows. What is compared:

    - embeddings of residues and of whole proteins, by their cosine;
    - of a language model its log-probabilities at every 8th residue, all of which are masked at once, and its best
      residue there and, in another pass, at residues that it sees; the effects of all mutations of one protein
      (`scanned`), each position masked in turn, by Spearman's rank correlation;
    - of a model with a trained contact head, how many of the most probable contacts are those of the original, in the
      mean over the first 20 proteins of 512 residues at most;
    - of a classifier its logits and its best class.

    The speed and the peak memory are those of embedding, the memory that of the whole process.

    Args:
        cls: an auto class that loads both.
        before: a repository on the Hub, or a folder.
        after: a folder; what is being computed lies beside it.
        revision: of what is on the Hub.
        proteins: cleaned sequences, one at least.

    Raises:
        RuntimeError: one of the models failed, with what it said.
    """
    commit = getattr(revision, "resolved", None) or revision
    device = device_name()
    with tempfile.TemporaryDirectory(dir=Path(after).parent) as folder:
        found = []
        for name, model in (("before", before), ("after", after)):
            place = Path(folder, name)
            place.mkdir()
            run(Task(cls.__name__, model, commit, device, list(proteins), str(place)))
            found.append((json.loads((place / MEASURED).read_text()), read_answers(place)))
        (measured, a), (measured_after, b) = found
        figures: Figures = {"proteins": len(proteins), "residues": len(a["residues"])}
        figures |= {"before": measured, "after": measured_after}
        return figures | differences(a, b)


def run(task: Task) -> None:
    """Compute a task in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run([sys.executable, "-c", PROCESS], input=json.dumps(task), capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"its process ended with status {done.returncode}"]
        raise UserRuntimeError(f"The report failed on {task.model}: {last[0]}.")


def read_answers(folder: Path) -> Arrays:
    with np.load(folder / ANSWERS) as file:
        answers = dict(file)
    answers["residues"] = np.memmap(folder / STATES, np.float32).reshape(-1, answers["proteins"].shape[-1])
    return answers


# One model


def main() -> None:
    answer(Task(*json.load(sys.stdin)))


def answer(task: Task) -> None:
    """What a model says of all proteins, into the task's folder."""
    cls = getattr(auto, task.cls)
    model = load_protein_model(cls, task.model, revision=task.revision, device=task.device, long="window")
    folder = Path(task.folder)
    answers, measured = embeddings(model, task.proteins, folder / STATES)
    sequences = [model.encode(protein) for protein in task.proteins]
    if model.network.get_output_embeddings() is not None:
        answers |= predictions(model, sequences) | mutation_scan(model, scanned(sequences))
    elif cls is not auto.MLXAutoModel:
        answers["logits"] = classes(model, sequences)
    answers |= contacts(model, sequences)
    np.savez(folder / ANSWERS, **answers)  # type: ignore[arg-type]
    (folder / MEASURED).write_text(json.dumps(measured))


def embeddings(model: ProteinModel, proteins: Sequence[str], states: Path) -> tuple[Arrays, dict[str, float]]:
    """The mean embedding of each protein [proteins, D], and what was measured; the states of residues [R, D] go into a
    file, so that they take no memory."""
    embed_all: Any = partial(embed, model=model, pooling=("mean", "residues"), strict=True)
    list(embed_all([min(proteins, key=len)]))  # whatever is made when it is needed first
    start, means = time.perf_counter(), []
    with open(states, "wb") as file:
        for result in embed_all(proteins):
            means.append(result.arrays["mean"])
            file.write(result.arrays["residues"].tobytes())
    seconds = time.perf_counter() - start
    found = np.stack(means)
    residues = states.stat().st_size // found[0].nbytes
    measured = {
        "weights_bytes": memory_of(model.network),
        "peak_bytes": peak_memory(),
        "residues_per_second": residues / seconds,
    }
    return {"proteins": found}, measured


def predictions(model: ProteinModel, sequences: Sequence[np.ndarray]) -> Arrays:
    """Of a language model: the best token of each residue that it `seen` [R], log-probabilities of those that are
    masked [M, vocabulary], and what these are [M]."""
    seen = [rows.argmax(axis=-1) for rows in model.blended_log_probabilities(sequences)]
    rows, truth, counted = [], [], counted_ids(model.vocabulary)
    shown = [masked(ids, model.vocabulary.mask) for ids in sequences]
    for ids, hidden, found in zip(sequences, shown, model.blended_log_probabilities(shown), strict=True):
        chosen = (hidden != ids) & np.isin(ids, counted)
        rows.append(found[chosen])
        truth.append(ids[chosen])
    return {"seen": np.concatenate(seen), "masked": np.concatenate(rows), "truth": np.concatenate(truth)}


def masked(ids: np.ndarray, mask: int) -> np.ndarray:
    """A sequence of ids with the mask at every 8th position, in the middle of each eight."""
    shown = ids.copy()
    shown[min(EVERY, len(ids)) // 2 :: EVERY] = mask
    return shown


def scanned(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """The longest of the sequences that have 128 residues at most; if there is none, the beginning of the shortest."""
    short = [ids for ids in sequences if len(ids) <= SCANNED]
    return max(short, key=len) if short else min(sequences, key=len)[:SCANNED]


def mutation_scan(model: ProteinModel, ids: np.ndarray) -> Arrays:
    """log p of each of the 20 residues minus that of the wild type, while the position is masked: [mutations]."""
    positions = np.flatnonzero(np.isin(ids, counted_ids(model.vocabulary)))
    rows, wild_types = model.masked_log_probabilities(ids, positions.tolist()), ids[positions][:, None]
    mutants = model.vocabulary.ids_of(STANDARD)
    effects = rows[:, mutants] - np.take_along_axis(rows, wild_types, axis=1)
    return {"mutations": effects[mutants != wild_types]}


def classes(model: ProteinModel, sequences: Sequence[np.ndarray]) -> np.ndarray:
    """The logits of a classifier, a row for each protein or, of each window, for each residue."""
    found: dict[tuple[int, int], np.ndarray] = {}
    for batch in model.batches(sequences):
        logits = np.array(model.network(batch.input_ids, batch.attention_mask).logits.astype(mx.float32))
        for window, rows in zip(batch.windows, logits, strict=True):
            residues = rows[batch.first : batch.first + window.length] if rows.ndim == 2 else rows[None]
            found[window.sequence, window.start] = residues
    return np.concatenate([found[place] for place in sorted(found)])


def contacts(model: ProteinModel, sequences: Sequence[np.ndarray]) -> Arrays:
    """The L most probable contacts of each protein as rows (number, i, j), most probable first; nothing, if the model
    has no trained contact head."""
    base = replace(model, network=model.network.base_model, batch_tokens=1)  # one by one: maps take memory
    try:
        check_head(base)
    except ValueError:
        return {}
    rows: list[tuple[int, int, int]] = []
    for number, ids in enumerate([ids for ids in sequences if len(ids) <= MAPPED][:MAPS]):
        (found,) = maps(base, [ids])
        rows += [(number, i, j) for i, j, _ in top_contacts(found["contacts"])]
    return {"contacts": np.array(rows, np.int32).reshape(-1, 3)}


def memory_of(network: Any) -> int:
    """Bytes of the parameters."""
    parameters: Any = tree_flatten(network.parameters())
    return sum(array.nbytes for _, array in parameters)


# Two models


def differences(a: Arrays, b: Arrays) -> Figures:
    """How far the answers `b` are from `a`."""
    figures: Figures = {}
    for name, key in (("residues", "residue_cosine"), ("proteins", "protein_cosine")):
        cosines = cosine(a[name], b[name])
        figures[key] = {"mean": float(cosines.mean()), "min": float(cosines.min())}
    if "masked" in a:
        rows = np.arange(len(a["truth"]))
        figures["pseudo_perplexity"] = {
            name: float(np.exp(-found["masked"][rows, found["truth"]].mean(dtype=np.float64)))
            for name, found in (("before", a), ("after", b))
        }
        figures["log_probability_difference"] = float(np.abs(a["masked"] - b["masked"]).mean(dtype=np.float64))
        figures["same_best_residue"] = {
            "masked": float((a["masked"].argmax(-1) == b["masked"].argmax(-1)).mean()),
            "seen": float((a["seen"] == b["seen"]).mean()),
        }
        figures["mutations"] = {"count": len(a["mutations"]), "spearman": spearman(a["mutations"], b["mutations"])}
    if "logits" in a:
        figures["logit_difference"] = float(np.abs(a["logits"] - b["logits"]).mean(dtype=np.float64))
        if a["logits"].shape[-1] > 1:  # else a regression
            figures["same_best_class"] = float((a["logits"].argmax(-1) == b["logits"].argmax(-1)).mean())
    if len(a.get("contacts", ())):
        figures["same_contacts"] = {
            name: same_contacts(a["contacts"], b["contacts"], part) for name, part in TOP.items()
        }
    return figures


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row, [rows], float64."""
    ab, aa, bb = (np.einsum("ij,ij->i", x, y, dtype=np.float64) for x, y in ((a, b), (a, a), (b, b)))
    return ab / np.sqrt(aa * bb)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of ranks; those of equal values are their mean."""

    def ranks(x: np.ndarray) -> np.ndarray:
        _, places, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[places]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def same_contacts(a: np.ndarray, b: np.ndarray, part: float) -> float:
    """The share of a protein's most probable contacts by `b`, L x part of them, that are among as many by `a`; the
    mean over proteins."""
    shares = []
    for number in np.unique(a[:, 0]):
        tops = [x[x[:, 0] == number, 1:] for x in (a, b)]
        count = max(1, round(len(tops[0]) * part))
        first, second = ({tuple(pair) for pair in top[:count].tolist()} for top in tops)
        shares.append(len(first & second) / count)
    return float(np.mean(shares))


def table(figures: Figures) -> list[Row]:
    """The figures as rows."""
    sides = [figures["before"], figures["after"]]
    rows: list[Row] = [
        ("memory of the weights", *(f"{side['weights_bytes'] / 1e6:,.1f} MB" for side in sides)),
        ("peak memory of embedding", *(f"{side['peak_bytes'] / 1e6:,.0f} MB" for side in sides)),
        ("residues per second", *(f"{side['residues_per_second']:,.0f}" for side in sides)),
    ]
    for name in ("residue", "protein"):
        values = figures[f"{name}_cosine"]
        for which, value in values.items():
            rows.append((f"{which} cosine of {name} embeddings", "", f"{value:.6f}"))
    if "pseudo_perplexity" in figures:
        perplexities = figures["pseudo_perplexity"]
        shown = (f"{perplexities[name]:.3f}" for name in ("before", "after"))
        rows.append((f"pseudo-perplexity, every {EVERY}th residue masked", *shown))
        rows.append(("mean |Δ log p| at masked residues", "", f"{figures['log_probability_difference']:.4g}"))
        for where, share in figures["same_best_residue"].items():
            rows.append((f"same best residue at {where} ones", "", f"{share:.2%}"))
        scan = figures["mutations"]
        rows.append((f"Spearman of the effects of {scan['count']} mutations", "", f"{scan['spearman']:.4f}"))
    else:
        rows.append(("pseudo-perplexity", "no language-model head", ""))
    if "logit_difference" in figures:
        rows.append(("mean |Δlogit|", "", f"{figures['logit_difference']:.4g}"))
    if "same_best_class" in figures:
        rows.append(("same best class", "", f"{figures['same_best_class']:.2%}"))
    for name, share in figures.get("same_contacts", {}).items():
        rows.append((f"same contacts among the top {name}", "", f"{share:.2%}"))
    return rows
