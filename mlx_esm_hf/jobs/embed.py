"""Embeddings of proteins and their residues, from any layer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import mlx.core as mx
import numpy as np

from mlx_esm_hf.checkpoint.sentence_transformers import sentence_pooling
from mlx_esm_hf.checks import MOST, check_choices, check_integer
from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.source import Proteins, ProteinSource
from mlx_esm_hf.data.vocabulary import refuse_structures
from mlx_esm_hf.data.windows import Window, blend
from mlx_esm_hf.dtypes import warn_once
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.jobs.protein_job import ProteinItems, load_checked, run_job
from mlx_esm_hf.jobs.protein_model import ProteinModel, as_protein_model, check_loading
from mlx_esm_hf.runs import formats
from mlx_esm_hf.runs.job import Arrays, Item, Job, OnProgress, Result, no_progress
from mlx_esm_hf.runs.outputs import check_outputs
from mlx_esm_hf.runs.run import WriteRun

POOLINGS = ("mean", "cls", "max", "residues", "chains", "spans", "mean_tokens", "max_tokens")
PER_RESIDUE = ("residues", "chains", "spans")
FORMATS: dict[str, WriteRun | None] = {
    "": None,
    ".safetensors": formats.write_safetensors,
    ".npz": formats.write_npz,
    ".h5": formats.write_h5,
    ".parquet": formats.write_parquet,
    ".csv": formats.write_csv,
}


@overload
def embed(proteins: Proteins, model: str | ProteinModel, output: None = None, **options: Any) -> Iterator[Result]: ...


@overload
def embed(proteins: Proteins, model: str | ProteinModel, output: str | os.PathLike[str], **options: Any) -> Report: ...


def embed(
    proteins: Proteins,
    model: str | ProteinModel,
    output: str | os.PathLike[str] | None = None,
    *,
    layers: Sequence[int] = (-1,),
    pooling: Sequence[str] = ("mean",),
    aligned: bool = False,
    structure: str | os.PathLike[str] | None = None,
    strict: bool = False,
    progress: OnProgress | bool = no_progress,
    **loading: Any,
) -> Iterator[Result] | Report:
    """Embed proteins: pool the hidden states of their residues, without <cls>, <eos> and padding.

    Args:
        proteins: see `read_proteins`.
        model: a Hub repository, a folder, or the result of `load_protein_model`.
        output: a folder of shards, or a `.safetensors`, `.npz`, `.h5`, `.parquet` or (without residues) `.csv` file;
            None to stream the results.
        layers: 0 for the embeddings up to the number of layers; negative numbers count from the end.
        pooling: any of "mean" and "max" (over residues), "cls" (the state of <cls>), "residues" (all states),
            "chains" (the number of each residue's chain, from 0), "spans" (where each token begins and ends in the
            sequence, from 0, for models of DNA), and "mean_tokens" and "max_tokens" (over all tokens, with <cls> and
            <eos>, as sentence-transformers pools).
        aligned: keep gaps.
        structure: a file of structure letters for a model of pairs, such as SaProt; see `data.structures.Structures`.
        strict: raise an error for a bad record instead of leaving it out.
        progress: called after each step; True shows a progress bar.
        loading: `revision`, `dtype`, `device`, `long`, `batch_tokens` and other options of `load_protein_model`.

    Returns:
        Without an output, an iterator over results. Their `arrays` have an entry for each pooling, [hidden_size] or
        [residues, hidden_size], named `mean.6` if there are several layers; `chains` is [residues, 1] and
        `spans` [residues, 2], int32. With an output, a report of what was changed and left out.

    Raises:
        UserError: an option has an unknown value, the proteins cannot be read, or the output cannot be written.

    Source: fair-esm's `extract.py`.

    Example:
        >>> for result in embed(["MKTAYIAKQR"], "facebook/esm2_t6_8M_UR50D"):
        ...     result.id, result.arrays["mean"].shape
        ('1', (320,))
    """
    check_choices("pooling", pooling, POOLINGS)
    if not layers:
        raise UserError("layers must name at least one layer, such as -1 for the last one.")
    for layer in layers:
        check_integer("layers", layer, -MOST)
    check_loading(model, **loading)
    source = ProteinSource.open(proteins, aligned, structure=structure)
    check_outputs(output, FORMATS)
    refused = [name for name in pooling if name in PER_RESIDUE]
    if refused and output is not None and Path(output).suffix == ".csv":
        raise UserError(
            f"{os.fspath(output)}: can't write {' and '.join(refused)}, because a `.csv` file has one row per protein. "
            "Use .h5, .npz, .parquet or .safetensors, or a name without a suffix for a folder."
        )
    from mlx_esm_hf.models.auto import MLXAutoModel

    protein_model = as_protein_model(MLXAutoModel, model, output, loading)
    if protein_model.is_checkpoint:
        report_sentence_pooling(protein_model, pooling)
    refuse_structures(protein_model.vocabulary, structure)
    config = protein_model.network.config
    resolved = resolve_layers(layers, config.num_hidden_layers)

    def compute(items: Sequence[Item]) -> list[Arrays]:
        return embeddings(protein_model, [item.content for item in items], resolved, pooling)

    def result_bytes(positions: int) -> int:
        rows = sum(positions if name in PER_RESIDUE else 1 for name in pooling)
        return 4 * config.hidden_size * len(resolved) * rows

    cleaner = protein_model.vocabulary.alphabet.clean
    items = ProteinItems(source, protein_model, result_bytes, output, strict=strict, clean=cleaner)
    settings = {"layers": resolved, "pooling": list(pooling), "aligned": aligned}
    settings = load_checked(protein_model, "embed", settings, items, output, progress)
    job = Job("embed", settings, items, compute, protein_model.chunk_work, cause=protein_model.cause)
    return run_job(job, items, output, FORMATS, progress)


def report_sentence_pooling(model: ProteinModel, pooling: Sequence[str]) -> None:
    """Warn if a checkpoint was made for sentence-transformers and its own pooling is not among those requested."""
    checkpoint = model.network
    try:
        found = sentence_pooling(checkpoint.source, **checkpoint.hub)
    except OSError:  # the Hub does not answer, but the model may be in the cache
        return
    if found is not None and (found.pooling not in pooling or found.later):
        warn_once(found.advice(model.name))


def resolve_layers(layers: Sequence[int], last: int) -> list[int]:
    """Convert negative layers to layers counted from the start, and drop repeated ones.

    Raises:
        UserError: the model does not have a layer.
    """
    if outside := [layer for layer in layers if not -last - 1 <= layer <= last]:
        raise UserError(f"Layer {outside[0]} not found. The model has the layers 0 to {last} (or -1 to {-last - 1}).")
    return list(dict.fromkeys(int(layer) % (last + 1) for layer in layers))


def embeddings(
    model: ProteinModel, sequences: Sequence[np.ndarray], layers: Sequence[int], pooling: Sequence[str]
) -> list[Arrays]:
    """Return the arrays of `embed` for each protein, given by its ids [positions]."""
    counts = [len(model.windows(i, len(ids))) for i, ids in enumerate(sequences)]
    parts: list[list[WindowStates]] = [[] for _ in sequences]  # until all windows of the protein are computed
    results: list[Arrays] = [{} for _ in sequences]
    for batch in model.batches(sequences):
        states = hidden_states(model, batch.input_ids, batch.attention_mask, layers)
        for window, row in zip(batch.windows, states, strict=True):
            index = window.sequence
            positions = row[:, batch.first : batch.first + window.length]
            end = batch.first + window.length
            around = np.concatenate([row[:, : batch.first], row[:, end : end + len(model.vocabulary.after)]], axis=1)
            parts[index].append((window, row[:, 0], around, positions))
            if len(parts[index]) == counts[index]:
                real = model.vocabulary.residue_mask(sequences[index])
                results[index] = pool(parts[index], real, layers, pooling)
                parts[index].clear()
                if "chains" in pooling:
                    results[index]["chains"] = np.cumsum(~real, dtype=np.int32)[real][:, None]
                if "spans" in pooling:
                    results[index]["spans"] = model.vocabulary.spans(sequences[index])[real]
    return results


def hidden_states(
    model: ProteinModel, input_ids: np.ndarray, attention_mask: np.ndarray, layers: Sequence[int]
) -> np.ndarray:
    """Return the hidden states after some layers, [B, layers, L, D], float32."""
    network = model.network.base_model
    last = network.config.num_hidden_layers
    outputs = network(input_ids, attention_mask, output_hidden_states=list(layers) != [last])
    states = [outputs.last_hidden_state if layer == last else outputs.hidden_states[layer] for layer in layers]
    return np.array(mx.stack(states, axis=1).astype(mx.float32))


# A window, its hidden states of <cls> [layers, D], of all tokens around the residues [layers, tokens, D], and of its
# positions [layers, positions, D].
WindowStates = tuple[Window, np.ndarray, np.ndarray, np.ndarray]


def pool(parts: Sequence[WindowStates], real: np.ndarray, layers: Sequence[int], pooling: Sequence[str]) -> Arrays:
    """Pool the hidden states of the windows of one protein.

    Args:
        parts: the windows and their hidden states.
        real: which positions are residues, bool [positions].
        layers: number of each layer of the states.
        pooling: see `embed`.

    Returns:
        {name: array}, float32.
    """
    arrays = {}
    for i, layer in enumerate(layers):
        positions = blend([(window, states[i]) for window, _, _, states in parts], len(real))
        residues = positions[real]
        around = np.mean([around[i] for _, _, around, _ in parts], axis=0)
        for name in pooling:
            if name in ("chains", "spans"):  # the same in all layers, added by the caller
                continue
            if name == "mean":
                pooled = residues.mean(axis=0, dtype=np.float64)
            elif name == "max":
                pooled = residues.max(axis=0)
            elif name == "cls":
                pooled = np.mean([cls[i] for _, cls, _, _ in parts], axis=0)
            elif name == "mean_tokens":
                pooled = np.concatenate([around, positions]).mean(axis=0, dtype=np.float64)
            elif name == "max_tokens":
                pooled = np.concatenate([around, positions]).max(axis=0)
            else:
                pooled = residues
            arrays[name if len(layers) == 1 else f"{name}.{layer}"] = pooled.astype(np.float32, copy=False)
    return arrays
