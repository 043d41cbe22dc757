"""Embeddings of proteins."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from transformers import PreTrainedTokenizerBase

from mlx_esm_hf import ops
from mlx_esm_hf.checkpoint.write import replace_files
from mlx_esm_hf.modeling_esm import MLXEsmModel
from mlx_esm_hf.pipelines.batching import batches
from mlx_esm_hf.pipelines.fasta import Protein


def embed(
    model: MLXEsmModel,
    tokenizer: PreTrainedTokenizerBase,
    proteins: Sequence[Protein],
    batch_tokens: int | None = None,
    progress: Callable[[int], None] = lambda residues: None,
) -> np.ndarray:
    """The mean of the last hidden state over a protein's residues: [proteins, hidden_size], in float32.

    Padding and special tokens do not take part, as in fair-esm's `extract`.

    Args:
        batch_tokens: most tokens, with padding, that go through the model together; by default what suits the device.
        progress: is told the number of residues after each batch.

    Raises:
        ValueError: a protein with letters outside the vocabulary, or longer than the model's position table.

    Example:
        >>> embed(model, tokenizer, [Protein("P1", "MKTAYIAKQR")]).shape
        (1, 320)
    """
    encoded = tokenizer([p.sequence for p in proteins], return_special_tokens_mask=True, verbose=False)
    for protein, special in zip(proteins, encoded["special_tokens_mask"], strict=True):
        # The tokenizer folds a run of unknown letters into one token.
        if special.count(0) != len(protein.sequence):
            known = set(tokenizer.get_vocab())
            unknown = sorted({letter for letter in protein.sequence if letter not in known})
            raise ValueError(
                f"{protein.id!r} has letters that are no residues of this model, {''.join(unknown)!r}: "
                "replace them by X, the unknown residue."
            )

    embeddings = np.empty((len(proteins), model.config.hidden_size), np.float32)
    for batch in batches([len(ids) for ids in encoded["input_ids"]], batch_tokens or ops.batch_tokens()):
        inputs = tokenizer.pad({k: [v[i] for i in batch] for k, v in encoded.items()}, return_tensors="np")
        residues = mx.array(1 - inputs.pop("special_tokens_mask"))
        try:
            outputs: Any = model(**inputs)
        except ValueError as error:
            raise ValueError(f"In the batch that begins with {proteins[batch[0]].id!r}: {error}") from error
        weights = (residues / residues.sum(axis=1, keepdims=True))[:, None, :]
        embeddings[batch] = np.array((weights @ outputs.last_hidden_state.astype(mx.float32))[:, 0])
        progress(int(residues.sum()))
    return embeddings


def save_embeddings(
    path: str | os.PathLike[str], embeddings: np.ndarray, ids: Sequence[str], metadata: dict[str, str]
) -> None:
    """Write a safetensors file with one tensor, `mean` [proteins, hidden_size], when all of it is there.

    The metadata of its header has the `ids`, a JSON list in the order of the rows, and what `metadata` says.
    """
    folder, name = os.path.split(os.path.abspath(path))
    with replace_files(folder) as temporary:
        metadata = {"ids": json.dumps(list(ids)), "pooling": "mean", **metadata}
        mx.save_safetensors(str(temporary / "embeddings.safetensors"), {"mean": mx.array(embeddings)}, metadata)
        os.replace(temporary / "embeddings.safetensors", temporary / name)
