"""Embeddings of proteins and of their residues, of any layer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_esm_hf import MLXEsmModel
from mlx_esm_hf.data.proteins import Report, Source
from mlx_esm_hf.pipelines.model import Loaded, Span, as_loaded, blend
from mlx_esm_hf.runs import formats
from mlx_esm_hf.runs.job import Cost, Job, Progress, check_output, no_progress
from mlx_esm_hf.runs.run import Arrays, Record

POOLINGS = ("mean", "cls", "max", "residues")
FORMATS = {
    "": None,
    ".safetensors": formats.write_safetensors,
    ".npz": formats.write_npz,
    ".h5": formats.write_h5,
    ".parquet": formats.write_parquet,
}


def embed(
    proteins: Source,
    model: str | Loaded,
    output: str | os.PathLike[str] | None = None,
    *,
    layers: Sequence[int] = (-1,),
    pooling: Sequence[str] = ("mean",),
    aligned: bool = False,
    strict: bool = False,
    progress: Progress = no_progress,
    **loading: Any,
) -> Iterator[Record] | Report:
    """Embed proteins: hidden states over the residues of each, without <cls>, <eos> and padding (fair-esm's `extract`).

    Args:
        proteins: see `read_proteins`.
        model: a Hub repository, a folder, or a model that was loaded by `load`.
        output: a folder of shards, or a file (`.safetensors`, `.npz`, `.h5`, `.parquet`).
        layers: 0, the embeddings, to the number of layers; or from the end, -1.
        pooling: of "mean", "max" (over residues), "cls" (the state of <cls>), and "residues" (all states).
        loading: `revision`, `dtype`, `device`, `long`, `batch_tokens` of `load`.

    Returns:
        Without an output, an iterator over records, whose `arrays` has one entry, [hidden_size] or
        [residues, hidden_size], for each pooling, called `mean.6` where there are several layers. With an output, a
        report of what was changed and left out.

    Example:
        >>> for record in embed(["MKTAYIAKQR"], "facebook/esm2_t6_8M_UR50D"):
        ...     record.id, record.arrays["mean"].shape
        ('1', (320,))
    """
    if unknown := [name for name in pooling if name not in POOLINGS]:
        raise ValueError(f"pooling {', '.join(unknown)}: choose from {', '.join(POOLINGS)}.")
    if not layers or not pooling:
        raise ValueError("There is nothing to compute without a layer and a pooling.")
    check_output(output, FORMATS)
    loaded = as_loaded(MLXEsmModel, model, output, loading)
    config = loaded.model.config
    resolved = resolve_layers(layers, config.num_hidden_layers)
    floats = sum(config.hidden_size * (1 if name != "residues" else 0) for name in pooling) * len(resolved)
    each = config.hidden_size * len(resolved) * ("residues" in pooling)
    job = Job(
        "embed",
        loaded,
        {"layers": resolved, "pooling": list(pooling)},
        lambda items: embeddings(loaded, [item.content for item in items], resolved, pooling),
        Cost(lambda tokens: tokens, lambda residues: 4 * (floats + each * residues)),
        FORMATS,
        aligned=aligned,
        strict=strict,
    )
    return job.run(proteins, output, progress)


def resolve_layers(layers: Sequence[int], last: int) -> list[int]:
    """Layers counted from the end as counted from the start.

    Raises:
        ValueError: a layer that the model does not have.
    """
    if outside := [layer for layer in layers if not -last - 1 <= layer <= last]:
        raise ValueError(f"The model has the layers 0 to {last} (or -1 to {-last - 1}), not {outside[0]}.")
    return list(dict.fromkeys(layer % (last + 1) for layer in layers))


def embeddings(
    loaded: Loaded, sequences: Sequence[np.ndarray], layers: Sequence[int], pooling: Sequence[str]
) -> list[Arrays]:
    """The results of `embed` for sequences of ids."""
    last = loaded.model.config.num_hidden_layers
    spans = [loaded.spans(item, len(ids)) for item, ids in enumerate(sequences)]
    pending: list[list[tuple[Span, np.ndarray, np.ndarray]]] = [[] for _ in sequences]  # windows until all are there
    results: list[Arrays] = [{} for _ in sequences]
    for batch in loaded.forwards(sequences, [span for group in spans for span in group]):
        outputs = loaded.model.base_model(
            batch.input_ids, batch.attention_mask, output_hidden_states=list(layers) != [last]
        )
        hidden = [outputs.last_hidden_state if layer == last else outputs.hidden_states[layer] for layer in layers]
        states = np.array(mx.stack(hidden, axis=1).astype(mx.float32))  # [B, layers, L, D]
        for span, row in zip(batch.spans, states, strict=True):
            residues = row[:, batch.first : batch.first + span.stop - span.start]
            parts = pending[span.item]
            parts.append((span, row[:, 0], residues))
            if len(parts) == len(spans[span.item]):
                results[span.item] = pool(parts, len(sequences[span.item]), layers, pooling)
                parts.clear()
    return results


def pool(
    parts: Sequence[tuple[Span, np.ndarray, np.ndarray]], length: int, layers: Sequence[int], pooling: Sequence[str]
) -> Arrays:
    """One protein's results, from <cls> [layers, D] and residues [layers, positions, D] of its windows."""
    arrays = {}
    for i, layer in enumerate(layers):
        states = blend([(span, residues[i]) for span, _, residues in parts], length)
        pooled = {
            "mean": lambda states=states: states.mean(axis=0, dtype=np.float64),
            "max": lambda states=states: states.max(axis=0),
            "cls": lambda i=i: np.mean([cls[i] for _, cls, _ in parts], axis=0),
            "residues": lambda states=states: states.copy(),
        }
        for name in pooling:
            arrays[name if len(layers) == 1 else f"{name}.{layer}"] = pooled[name]().astype(np.float32, copy=False)
    return arrays
