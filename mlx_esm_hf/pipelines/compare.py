"""Two models on the same proteins: how far their answers are apart."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_esm_hf.data.batches import Batch
from mlx_esm_hf.data.proteins import Report, Source, read_proteins
from mlx_esm_hf.pipelines.perplexity import counted_ids, one_pass, perplexity_of
from mlx_esm_hf.pipelines.protein_model import ProteinModel

Row = tuple[str, ...]  # what, before, after


def compare(before: ProteinModel, after: ProteinModel, proteins: Source) -> list[Row]:
    """How much memory two models of one architecture take, and how their answers differ.

    Of a language model and of a classifier of residues each residue is compared, of a classifier each protein: the mean
    difference of its logits, and whether the largest is the same. Of a model without a head the last hidden state of
    each residue is. Pseudo-perplexity is the estimate from one pass, over all residues together.

    Args:
        proteins: see `read_proteins`; a protein beyond the position table is seen in windows.

    Raises:
        ValueError: there are no proteins, or some cannot be read.
    """
    sequences = [before.vocabulary.encode(p.sequence) for p in read_proteins(proteins, report=Report(strict=True))]
    if not sequences:
        raise ValueError("There are no proteins to compare the models on.")
    rows: list[Row] = [("memory", *(f"{memory_of(model.network) / 1e6:,.1f} MB" for model in (before, after)))]
    likelihoods: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])  # log p of each residue, before and after
    totals: dict[str, np.ndarray] = {}  # of each measure, its sum and how many values it has
    for batch in before.batches(sequences):
        answers = [answers_of(model.network, batch) for model in (before, after)]
        for name, values in differences(*answers).items():
            totals[name] = totals.get(name, np.zeros(2)) + (values.sum(dtype=np.float64), values.size)
        if is_language_model(before.network):
            residues = np.concatenate([sequences[w.sequence][w.start : w.stop] for w in batch.windows])
            for found, (_, logits) in zip(likelihoods, answers, strict=True):
                found.append(residue_likelihoods(before, logits, residues))
    perplexities = ["no language-model head", ""]
    if likelihoods[0]:
        perplexities = [f"{perplexity_of(np.concatenate(found)).item():.4f}" for found in likelihoods]
    rows.append(("pseudo-perplexity, from one pass", *perplexities))
    return rows + [(name, "", FORMATS[name].format(total / count)) for name, (total, count) in totals.items()]


FORMATS = {"mean |Δlogit|": "{:.4g}", "same argmax": "{:.2%}", "cosine of hidden states": "{:.6f}"}


def memory_of(network: Any) -> int:
    """Bytes of the parameters."""
    parameters: Any = tree_flatten(network.parameters())
    return sum(array.nbytes for _, array in parameters)


def is_language_model(network: Any) -> bool:
    return network.get_output_embeddings() is not None


def answers_of(network: Any, batch: Batch) -> tuple[str, np.ndarray]:
    """What a network says of a batch: ("logits" or "last_hidden_state", [rows, ...]), a row for each residue, or for
    each window if it classifies proteins."""
    outputs = network(batch.input_ids, batch.attention_mask)
    name = "logits" if "logits" in outputs else "last_hidden_state"
    array = np.array(outputs[name].astype(mx.float32))
    if array.ndim == 3:
        first = batch.first
        array = np.concatenate([x[first : first + w.length] for w, x in zip(batch.windows, array, strict=True)])
    return name, array


def differences(before: tuple[str, np.ndarray], after: tuple[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{name of a measure: its values, one for each row, or number}"""
    name, a = before
    b = after[1]
    if name == "last_hidden_state":
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return {"cosine of hidden states": (a * b).sum(axis=-1) / norms}
    measures = {"mean |Δlogit|": np.abs(a - b).ravel()}
    if a.shape[-1] > 1:  # a regression has no classes
        measures["same argmax"] = a.argmax(axis=-1) == b.argmax(axis=-1)
    return measures


def residue_likelihoods(model: ProteinModel, logits: np.ndarray, residues: np.ndarray) -> np.ndarray:
    """Estimates of log p, see `one_pass`, of those residues that count: logits [residues, vocabulary] and their ids."""
    counted = np.isin(residues, counted_ids(model.vocabulary))
    chosen = logits[counted].astype(np.float64)
    chosen -= np.logaddexp.reduce(chosen, axis=-1, keepdims=True)
    return one_pass(chosen[np.arange(len(chosen)), residues[counted]])
