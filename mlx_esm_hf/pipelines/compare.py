"""Two models on the same proteins: how far their answers are apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_esm_hf.data.batches import Batch
from mlx_esm_hf.data.proteins import Protein
from mlx_esm_hf.pipelines.perplexity import counted_ids
from mlx_esm_hf.pipelines.protein_model import ProteinModel

Row = tuple[str, ...]  # what, before, after

EVERY = 8  # of so many residues one is masked: as many as in training, about


def compare(before: ProteinModel, after: ProteinModel, proteins: Iterable[Protein]) -> list[Row]:
    """How much memory two models of one architecture take, and how their answers differ, as a table.

    A language model sees each protein once, with every 8th residue masked. Its pseudo-perplexity is e^(-mean log p) of
    those residues, and it is there that its best residue is compared: one that it sees it merely repeats. The mean
    difference of logits is over all residues; of a classifier it is over residues or proteins. A model without a head
    is compared by the last hidden state of each residue.

    Args:
        proteins: one at least; what is beyond the position table is seen in windows.
    """
    sequences = [before.vocabulary.encode(protein.sequence) for protein in proteins]
    language_model = before.network.get_output_embeddings() is not None
    shown = [masked(ids, before.vocabulary.mask) for ids in sequences] if language_model else sequences
    counted = counted_ids(before.vocabulary)
    found: dict[str, list[np.ndarray]] = defaultdict(list)  # a number for each residue or protein
    for batch in before.batches(shown):
        (name, a), (_, b) = (answers(model.network, batch) for model in (before, after))
        if name == "last_hidden_state":
            found["cosine"].append((a * b).sum(axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))
            continue
        found["difference"].append(np.abs(a - b).mean(axis=-1))
        if language_model:
            residues = in_windows(sequences, batch)
            chosen = (in_windows(shown, batch) != residues) & np.isin(residues, counted)
            a, b, residues = a[chosen], b[chosen], residues[chosen]
            found["before"].append(log_probabilities(a, residues))
            found["after"].append(log_probabilities(b, residues))
        if a.shape[-1] > 1:  # else a regression
            found["same"].append(a.argmax(axis=-1) == b.argmax(axis=-1))
    mean = {name: np.concatenate(values).mean(dtype=np.float64) for name, values in found.items()}

    rows: list[Row] = [("memory", *(f"{memory_of(model.network) / 1e6:,.1f} MB" for model in (before, after)))]
    if language_model:
        perplexities = (f"{np.exp(-mean[name]):.3f}" for name in ("before", "after"))
        rows.append((f"pseudo-perplexity, every {EVERY}th residue masked", *perplexities))
    else:
        rows.append(("pseudo-perplexity", "no language-model head", ""))
    if "cosine" in mean:
        rows.append(("mean cosine of hidden states", "", f"{mean['cosine']:.6f}"))
    if "difference" in mean:
        rows.append(("mean |Δlogit|", "", f"{mean['difference']:.4g}"))
    if "same" in mean:
        where = "best residue at masked ones" if language_model else "best class"
        rows.append((f"same {where}", "", f"{mean['same']:.2%}"))
    return rows


def masked(ids: np.ndarray, mask: int) -> np.ndarray:
    """A sequence of ids with the mask at every 8th position, in the middle of each eight."""
    shown = ids.copy()
    shown[min(EVERY, len(ids)) // 2 :: EVERY] = mask
    return shown


def in_windows(sequences: Sequence[np.ndarray], batch: Batch) -> np.ndarray:
    """The ids of a batch's residues, one window behind the other."""
    return np.concatenate([sequences[w.sequence][w.start : w.stop] for w in batch.windows])


def answers(network: Any, batch: Batch) -> tuple[str, np.ndarray]:
    """What a network says of a batch: ("logits" or "last_hidden_state", [rows, ...], float32), a row for each residue,
    one window behind the other, or for each protein if it classifies those."""
    outputs = network(batch.input_ids, batch.attention_mask)
    name = "logits" if "logits" in outputs else "last_hidden_state"
    array = np.array(outputs[name].astype(mx.float32))
    if array.ndim == 3:
        pairs = zip(batch.windows, array, strict=True)
        array = np.concatenate([rows[batch.first : batch.first + window.length] for window, rows in pairs])
    return name, array


def log_probabilities(logits: np.ndarray, residues: np.ndarray) -> np.ndarray:
    """log p of residues [rows] from logits [rows, vocabulary]."""
    logits = logits.astype(np.float64)
    return logits[np.arange(len(residues)), residues] - np.logaddexp.reduce(logits, axis=-1)


def memory_of(network: Any) -> int:
    """Bytes of the parameters."""
    parameters: Any = tree_flatten(network.parameters())
    return sum(array.nbytes for _, array in parameters)
