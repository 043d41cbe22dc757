"""Embeddings of proteins and of their residues, of any layer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_esm_hf.data.proteins import Report, Source
from mlx_esm_hf.data.windows import Window, blend
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.jobs.protein_job import ProteinJob, WriteRun
from mlx_esm_hf.jobs.protein_model import ProteinModel, as_protein_model
from mlx_esm_hf.models.auto import MLXAutoModel
from mlx_esm_hf.runs import formats
from mlx_esm_hf.runs.job import Arrays, Item, OnProgress, Result, no_progress
from mlx_esm_hf.runs.outputs import check_outputs

POOLINGS = ("mean", "cls", "max", "residues", "chains")
PER_RESIDUE = ("residues", "chains")
FORMATS: dict[str, WriteRun | None] = {
    "": None,
    ".safetensors": formats.write_safetensors,
    ".npz": formats.write_npz,
    ".h5": formats.write_h5,
    ".parquet": formats.write_parquet,
}


def embed(
    proteins: Source,
    model: str | ProteinModel,
    output: str | os.PathLike[str] | None = None,
    *,
    layers: Sequence[int] = (-1,),
    pooling: Sequence[str] = ("mean",),
    aligned: bool = False,
    strict: bool = False,
    progress: OnProgress = no_progress,
    **loading: Any,
) -> Iterator[Result] | Report:
    """Embed proteins: hidden states over the residues of each, without <cls>, <eos> and padding (fair-esm's `extract`).

    Args:
        proteins: see `read_proteins`.
        model: a Hub repository, a folder, or a model that was loaded by `load`.
        output: a folder of shards, or a file (`.safetensors`, `.npz`, `.h5`, `.parquet`).
        layers: 0, the embeddings, to the number of layers; or from the end, -1.
        pooling: of "mean", "max" (over residues), "cls" (the state of <cls>), "residues" (all states), and "chains"
            (the number of each residue's chain, from 0).
        loading: `revision`, `dtype`, `device`, `long`, `batch_tokens` and the others of `load`.

    Returns:
        Without an output, an iterator over results, whose `arrays` has one entry, [hidden_size] or
        [residues, hidden_size], for each pooling, called `mean.6` where there are several layers, and for the chains
        `chains`, int32 [residues, 1]. With an output, a report of what was changed and left out.

    Example:
        >>> for result in embed(["MKTAYIAKQR"], "facebook/esm2_t6_8M_UR50D"):
        ...     result.id, result.arrays["mean"].shape
        ('1', (320,))
    """
    if unknown := [name for name in pooling if name not in POOLINGS]:
        raise UserError(f"pooling {', '.join(unknown)}: choose from {', '.join(POOLINGS)}.")
    if not layers or not pooling:
        raise UserError("There is nothing to compute without a layer and a pooling.")
    check_outputs(output, FORMATS)
    protein_model = as_protein_model(MLXAutoModel, model, output, loading)
    config = protein_model.network.config
    resolved = resolve_layers(layers, config.num_hidden_layers)

    def compute(items: Sequence[Item]) -> list[Arrays]:
        return embeddings(protein_model, [item.content for item in items], resolved, pooling)

    def size(residues: int) -> int:
        rows = sum(residues if name in PER_RESIDUE else 1 for name in pooling)
        return 4 * config.hidden_size * len(resolved) * rows

    job = ProteinJob(
        "embed",
        protein_model,
        {"layers": resolved, "pooling": list(pooling)},
        compute,
        size,
        arrays=len(resolved) * len(pooling) if set(PER_RESIDUE) & set(pooling) else 0,
        aligned=aligned,
        strict=strict,
    )
    if output is None:
        return job.stream(proteins)
    return job.write(proteins, Path(output), FORMATS, progress)


def resolve_layers(layers: Sequence[int], last: int) -> list[int]:
    """Layers counted from the end as counted from the start.

    Raises:
        ValueError: a layer that the model does not have.
    """
    if outside := [layer for layer in layers if not -last - 1 <= layer <= last]:
        raise UserError(f"The model has the layers 0 to {last} (or -1 to {-last - 1}), not {outside[0]}.")
    return list(dict.fromkeys(layer % (last + 1) for layer in layers))


def embeddings(
    model: ProteinModel, sequences: Sequence[np.ndarray], layers: Sequence[int], pooling: Sequence[str]
) -> list[Arrays]:
    """The results of `embed` for sequences of ids."""
    counts = [len(model.windows(i, len(ids))) for i, ids in enumerate(sequences)]
    parts: list[list[WindowStates]] = [[] for _ in sequences]  # until those of all windows are there
    results: list[Arrays] = [{} for _ in sequences]
    for batch in model.batches(sequences):
        states = hidden_states(model, batch.input_ids, batch.attention_mask, layers)
        for window, row in zip(batch.windows, states, strict=True):
            index = window.sequence
            residues = row[:, batch.first : batch.first + window.length]
            parts[index].append((window, row[:, 0], residues))
            if len(parts[index]) == counts[index]:
                real = model.vocabulary.residues(sequences[index])
                results[index] = pool(parts[index], real, layers, pooling)
                parts[index].clear()
                if "chains" in pooling:
                    results[index]["chains"] = np.cumsum(~real, dtype=np.int32)[real][:, None]
    return results


def hidden_states(
    model: ProteinModel, input_ids: np.ndarray, attention_mask: np.ndarray, layers: Sequence[int]
) -> np.ndarray:
    """The states after some layers, [B, layers, L, D], float32."""
    network = model.network.base_model
    last = network.config.num_hidden_layers
    outputs = network(input_ids, attention_mask, output_hidden_states=list(layers) != [last])
    states = [outputs.last_hidden_state if layer == last else outputs.hidden_states[layer] for layer in layers]
    return np.array(mx.stack(states, axis=1).astype(mx.float32))


# A window with its states of <cls>, [layers, D], and of its residues, [layers, positions, D].
WindowStates = tuple[Window, np.ndarray, np.ndarray]


def pool(parts: Sequence[WindowStates], real: np.ndarray, layers: Sequence[int], pooling: Sequence[str]) -> Arrays:
    """One protein's results from its windows, over its `real` residues, bool [positions]."""
    arrays = {}
    for i, layer in enumerate(layers):
        residues = blend([(window, states[i]) for window, _, states in parts], len(real))[real]
        for name in pooling:
            if name == "chains":  # which are the same in all layers
                continue
            if name == "mean":
                pooled = residues.mean(axis=0, dtype=np.float64)
            elif name == "max":
                pooled = residues.max(axis=0)
            elif name == "cls":
                pooled = np.mean([cls[i] for _, cls, _ in parts], axis=0)
            else:
                pooled = residues
            arrays[name if len(layers) == 1 else f"{name}.{layer}"] = pooled.astype(np.float32, copy=False)
    return arrays
