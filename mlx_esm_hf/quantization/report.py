"""Compare a converted checkpoint with the original: memory, speed, and how close its answers are.

Each model runs in its own process, one after the other, so that peak memory and speed are comparable. The process reads
a `Task` from standard input and writes its answers into a folder.
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
from mlx_esm_hf.jobs.protein_model import ProteinModel, load_protein_model
from mlx_esm_hf.models import auto
from mlx_esm_hf.runs.job import Arrays
from mlx_esm_hf.runtime.device import device_name
from mlx_esm_hf.runtime.memory import peak_memory

Row = tuple[str, ...]  # what, before, after
Figures = dict[str, Any]  # for JSON

EVERY = 8  # one residue in EVERY is masked, about as many as in training
SCANNED = 128  # maximum residues of the protein whose mutations are scanned
MAPPED, MAPS = 512, 20  # contacts are compared for MAPS proteins of at most MAPPED residues, because maps are slow
TOP = {"L/5": 0.2, "L/2": 0.5, "L": 1.0}  # number of contacts of a protein with L residues, as a fraction of L
# Keeps transformers from importing torch, which would count as the model's memory.
PROCESS = "import sys; sys.modules['torch'] = None; from mlx_esm_hf.quantization import report; report.main()"
STATES, ANSWERS, MEASURED = "residues.f32", "answers.npz", "measured.json"


class Task(NamedTuple):
    """A model, the name of its class in `models.auto`, and the proteins to run it on."""

    cls: str
    model: str
    revision: str
    device: str
    proteins: list[str]
    folder: str  # for the answers


def compare(cls: Any, before: str, after: str, revision: str, proteins: Sequence[str]) -> Figures:
    """Run two checkpoints on the same proteins and compare their answers.

    Proteins longer than the position table are cut into windows. Compared are:

    - embeddings of residues and of proteins, by cosine similarity;
    - for language models: log-probabilities at every 8th residue, all masked at once; the top residue there and, in
      another pass, at visible residues; and the effects of all mutations of one protein (`protein_to_scan`), each
      position masked in turn, by Spearman's rank correlation;
    - for models with a trained contact head: the fraction of the most probable contacts that both share, averaged over
      the first 20 proteins of at most 512 residues;
    - for classifiers: logits and the top class.

    Speed and peak memory are measured while embedding; peak memory is that of the whole process.

    Args:
        cls: an auto class that loads both.
        before: Hub id or folder.
        after: folder. Temporary files are written next to it.
        revision: revision of the Hub repository.
        proteins: cleaned sequences, at least one.

    Raises:
        RuntimeError: one of the models failed; the message has its last line.
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
    """Compute a task in its own process.

    Raises:
        RuntimeError: the process failed.
    """
    done = subprocess.run([sys.executable, "-c", PROCESS], input=json.dumps(task), capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"its process exited with status {done.returncode}"]
        raise UserRuntimeError(f"The report failed on {task.model}: {last[0]}.")


def read_answers(folder: Path) -> Arrays:
    """Read the answers of a process, with the residues' embeddings mapped from their file."""
    with np.load(folder / ANSWERS) as file:
        answers = dict(file)
    answers["residues"] = np.memmap(folder / STATES, np.float32).reshape(-1, answers["proteins"].shape[-1])
    return answers


# One model


def main() -> None:
    """Compute the task on standard input."""
    answer(Task(*json.load(sys.stdin)))


def answer(task: Task) -> None:
    """Run a model on all proteins and write its answers into the task's folder."""
    cls = getattr(auto, task.cls)
    model = load_protein_model(cls, task.model, revision=task.revision, device=task.device, long="window")
    folder = Path(task.folder)
    answers, measured = embeddings(model, task.proteins, folder / STATES)
    sequences = [model.encode(protein) for protein in task.proteins]
    if model.network.get_output_embeddings() is not None:
        answers |= predictions(model, sequences) | mutation_scan(model, protein_to_scan(sequences))
    elif cls is not auto.MLXAutoModel:
        answers["logits"] = classes(model, sequences)
    answers |= contacts(model, sequences)
    np.savez(folder / ANSWERS, **answers)  # type: ignore[arg-type]
    (folder / MEASURED).write_text(json.dumps(measured))


def embeddings(model: ProteinModel, proteins: Sequence[str], states: Path) -> tuple[Arrays, dict[str, float]]:
    """Return the mean embedding of each protein [proteins, D], and memory and speed.

    The embeddings of residues [R, D] are written to the file `states`, because they can be large.
    """
    embed_all: Any = partial(embed, model=model, pooling=("mean", "residues"), strict=True)
    list(embed_all([min(proteins, key=len)]))  # warm up
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
    """Return a language model's predictions.

    Returns:
        "seen": the top token at each visible residue [R]; "masked": log-probabilities at the masked ones
        [M, vocabulary]; "truth": the masked tokens [M].
    """
    seen = [rows.argmax(axis=-1) for rows in model.blended_log_probabilities(sequences)]
    rows, truth, counted = [], [], model.vocabulary.predicted
    masked = [mask_every(ids, model.vocabulary.mask) for ids in sequences]
    for ids, inputs, log_probabilities in zip(sequences, masked, model.blended_log_probabilities(masked), strict=True):
        chosen = (inputs != ids) & np.isin(ids, counted)
        rows.append(log_probabilities[chosen])
        truth.append(ids[chosen])
    return {"seen": np.concatenate(seen), "masked": np.concatenate(rows), "truth": np.concatenate(truth)}


def mask_every(ids: np.ndarray, mask: int) -> np.ndarray:
    """Return token ids with every 8th one masked, in the middle of each eight."""
    inputs = ids.copy()
    inputs[min(EVERY, len(ids)) // 2 :: EVERY] = mask
    return inputs


def protein_to_scan(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Return the longest sequence of at most 128 residues; if there is none, the first 128 of the shortest."""
    short = [ids for ids in sequences if len(ids) <= SCANNED]
    return max(short, key=len) if short else min(sequences, key=len)[:SCANNED]


def mutation_scan(model: ProteinModel, ids: np.ndarray) -> Arrays:
    """Return log p(mutant) − log p(wild type) for all single mutations, each position masked in turn: [mutations]."""
    positions = np.flatnonzero(np.isin(ids, model.vocabulary.predicted))
    rows, wild_types = model.masked_log_probabilities(ids, positions.tolist()), ids[positions][:, None]
    mutants = model.vocabulary.ids_of(STANDARD)
    effects = rows[:, mutants] - np.take_along_axis(rows, wild_types, axis=1)
    return {"mutations": effects[mutants != wild_types]}


def classes(model: ProteinModel, sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Return the logits of a classifier: one row per protein or, for token classifiers, per residue of each window."""
    found: dict[tuple[int, int], np.ndarray] = {}
    for batch in model.batches(sequences):
        logits = np.array(model.network(batch.input_ids, batch.attention_mask).logits.astype(mx.float32))
        for window, rows in zip(batch.windows, logits, strict=True):
            residues = rows[batch.first : batch.first + window.length] if rows.ndim == 2 else rows[None]
            found[window.sequence, window.start] = residues
    return np.concatenate([found[place] for place in sorted(found)])


def contacts(model: ProteinModel, sequences: Sequence[np.ndarray]) -> Arrays:
    """Return the L most probable contacts of each protein as rows (number, i, j), most probable first.

    Returns an empty dict if the model has no trained contact head.
    """
    base = replace(model, network=model.network.base_model, batch_tokens=1)  # one at a time, because maps are large
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
    """Return the size of the parameters in bytes."""
    parameters: Any = tree_flatten(network.parameters())
    return sum(array.nbytes for _, array in parameters)


# Two models


def differences(a: Arrays, b: Arrays) -> Figures:
    """Return how far the answers `b` are from `a`."""
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
        if a["logits"].shape[-1] > 1:  # not a regression
            figures["same_best_class"] = float((a["logits"].argmax(-1) == b["logits"].argmax(-1)).mean())
    if len(a.get("contacts", ())):
        figures["same_contacts"] = {
            name: same_contacts(a["contacts"], b["contacts"], part) for name, part in TOP.items()
        }
    return figures


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine similarity of corresponding rows: [rows], float64."""
    ab, aa, bb = (np.einsum("ij,ij->i", x, y, dtype=np.float64) for x, y in ((a, b), (a, a), (b, b)))
    return ab / np.sqrt(aa * bb)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation; ties get their mean rank."""

    def ranks(x: np.ndarray) -> np.ndarray:
        _, places, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[places]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def same_contacts(a: np.ndarray, b: np.ndarray, part: float) -> float:
    """Return the fraction of the L · part most probable contacts that `a` and `b` share, averaged over proteins."""
    shares = []
    for number in np.unique(a[:, 0]):
        tops = [x[x[:, 0] == number, 1:] for x in (a, b)]
        count = max(1, round(len(tops[0]) * part))
        first, second = ({tuple(pair) for pair in top[:count].tolist()} for top in tops)
        shares.append(len(first & second) / count)
    return float(np.mean(shares))


def table(figures: Figures) -> list[Row]:
    """Return the figures as rows of a table."""
    sides = [figures["before"], figures["after"]]
    rows: list[Row] = [
        ("memory of the weights", *(f"{side['weights_bytes'] / 1e6:,.1f} MB" for side in sides)),
        ("peak memory of embedding", *(f"{side['peak_bytes'] / 1e6:,.0f} MB" for side in sides)),
        ("residues per second", *(f"{side['residues_per_second']:,.0f}" for side in sides)),
    ]
    for name in ("residue", "protein"):
        for which, value in figures[f"{name}_cosine"].items():
            rows.append((f"{which} cosine of {name} embeddings", "", f"{value:.6f}"))
    if "pseudo_perplexity" in figures:
        perplexities = figures["pseudo_perplexity"]
        values = (f"{perplexities[name]:.3f}" for name in ("before", "after"))
        rows.append((f"pseudo-perplexity, every {EVERY}th residue masked", *values))
        rows.append(("mean |Δ log p| at masked residues", "", f"{figures['log_probability_difference']:.4g}"))
        for where, share in figures["same_best_residue"].items():
            rows.append((f"same top residue where {where}", "", f"{share:.2%}"))
        scan = figures["mutations"]
        rows.append((f"Spearman of the effects of {scan['count']} mutations", "", f"{scan['spearman']:.4f}"))
    else:
        rows.append(("pseudo-perplexity", "no language-model head", ""))
    if "logit_difference" in figures:
        rows.append(("mean |Δlogit|", "", f"{figures['logit_difference']:.4g}"))
    if "same_best_class" in figures:
        rows.append(("same top class", "", f"{figures['same_best_class']:.2%}"))
    for name, share in figures.get("same_contacts", {}).items():
        rows.append((f"same contacts among the top {name}", "", f"{share:.2%}"))
    return rows
