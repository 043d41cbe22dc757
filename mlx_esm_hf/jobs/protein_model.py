"""A model with its tokenizer, as the jobs use it: sequences of ids through the network, in windows and batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from transformers import PreTrainedTokenizerBase

from mlx_esm_hf import ops
from mlx_esm_hf.data.batches import Batch, RowCost, make_batches
from mlx_esm_hf.data.tokenizer import load_tokenizer
from mlx_esm_hf.data.vocabulary import Vocabulary, refuse_other_tokenizer
from mlx_esm_hf.data.windows import Window, blend, cut_windows, ramp
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.models.auto import MLXAutoModel
from mlx_esm_hf.quantization.layers import has_int8_activations
from mlx_esm_hf.runs.outputs import earlier_settings
from mlx_esm_hf.runtime import distributed, memory
from mlx_esm_hf.runtime.costs import costs
from mlx_esm_hf.runtime.device import device_name, use_device

# Arguments of `from_pretrained` that the tokenizer has, too.
SHARED = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download")
LONG = ("error", "truncate", "window")

# What a config may ask for by default, and jobs do not.
PLAIN = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}


@dataclass
class ProteinModel:
    """A model, its tokenizer, and how to give proteins to it.

    Args:
        network: the model.
        tokenizer: its tokenizer.
        name, revision: where it is from, for manifests and messages.
        long: what becomes of a protein beyond the position table: "error", "truncate", or "window", overlapping pieces.
        batch_tokens: most tokens, with padding, of a batch; 0, as many as suit the device and fit.
    """

    network: Any
    tokenizer: PreTrainedTokenizerBase
    name: str = ""
    revision: str | None = None
    long: str = "error"
    batch_tokens: int = 0

    def __post_init__(self) -> None:
        self.batch_tokens = self.batch_tokens or memory.batch_tokens(self.network.config.hidden_size)
        if self.long not in LONG:
            raise UserError(f"long={self.long!r} is not one of {', '.join(LONG)}.")
        self.vocabulary = Vocabulary(self.tokenizer, self.name)
        refuse_other_tokenizer(self.tokenizer, self.network.config, self.network.residues, self.name)

    @property
    def longest(self) -> int | None:
        """Most residues that the model takes at once; None where there is no end."""
        most: int | None = self.network.max_tokens
        return None if most is None else most - self.vocabulary.around

    @property
    def settings(self) -> dict[str, Any]:
        """What results depend on, for the manifest of a run."""
        return settings_of(self) | {"long": self.long}

    def refuse_long(self, length: int) -> None:
        """
        Raises:
            ValueError: a protein of so many residues is too long, and that is to be an error.
        """
        if self.long == "error" and self.longest is not None and length > self.longest:
            raise UserError(
                f"has {length} residues, the position table of {self.name or 'this model'} ends at {self.longest}. "
                "Take --long truncate, --long window, or ESM-2, which has no such limit"
            )

    def encode(self, sequence: str) -> np.ndarray:
        """What is read of a cleaned sequence as ids [positions]: its beginning, if long proteins are truncated.

        Raises:
            ValueError: a token that the vocabulary does not have.
        """
        ids = self.vocabulary.encode(sequence)
        return ids[: self.longest] if self.long == "truncate" else ids

    def residues(self, ids: np.ndarray) -> int:
        """How many of a sequence of ids are residues: all but the breaks between chains."""
        return int(self.vocabulary.residues(ids).sum())

    def passes(self, ids: np.ndarray) -> list[int]:
        """How many tokens each window of a sequence of ids has."""
        return [window.length + self.vocabulary.around for window in self.windows(0, len(ids))]

    def windows(self, sequence: int, length: int) -> list[Window]:
        """A sequence, by its index and length, in as many windows as the model needs; see `cut_windows`."""
        return cut_windows(sequence, length, self.longest)

    def batches(
        self,
        sequences: Sequence[np.ndarray],
        windows: Sequence[Window] | None = None,
        row_cost: RowCost | None = None,
    ) -> Iterator[Batch]:
        """Windows of sequences of ids, by default all of each, in batches of like length; not in order.

        Args:
            row_cost: see `by_length`; by default `row_cost()`.
        """
        if windows is None:
            windows = [window for i, ids in enumerate(sequences) for window in self.windows(i, len(ids))]
        return make_batches(sequences, windows, self.vocabulary, self.batch_tokens, row_cost or self.row_cost())

    def row_cost(self) -> RowCost | None:
        """What a row costs; None, nothing, where batches are packed. See `by_length`."""
        if ops.packs(self.network.dtype):
            return None
        launch = costs().launch_tokens
        return lambda tokens: tokens / launch

    def log_probabilities(
        self, sequences: Sequence[np.ndarray], windows: Sequence[Window] | None = None
    ) -> Iterator[tuple[Window, np.ndarray]]:
        """For windows of sequences, by default all of each, log-probabilities [positions, vocabulary], float32; not in
        order."""
        for batch in self.batches(sequences, windows):
            logits = self.network(batch.input_ids, batch.attention_mask).logits.astype(mx.float32)
            rows = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            for window, row in zip(batch.windows, rows, strict=True):
                yield window, row[batch.first : batch.first + window.length]

    def blended_log_probabilities(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Those of each sequence at all of its positions: [positions, vocabulary], float32."""
        parts: list[list[tuple[Window, np.ndarray]]] = [[] for _ in sequences]
        for window, rows in self.log_probabilities(sequences):
            parts[window.sequence].append((window, rows))
        return [blend(windows, len(ids)) for windows, ids in zip(parts, sequences, strict=True)]

    def masked_log_probabilities(self, ids: np.ndarray, positions: Sequence[int]) -> np.ndarray:
        """Log-probabilities at each of these positions while it, alone, is masked: [len(positions), vocabulary].

        Of a protein in windows, each position is seen in the one where it is farthest from the edges.
        """
        windows = self.windows(0, len(ids))
        weights = np.full((len(windows), len(ids)), -1, np.float32)
        for row, window in zip(weights, windows, strict=True):
            row[window.start : window.stop] = ramp(window, len(ids))
        best = weights.argmax(axis=0)
        found = np.empty((len(positions), self.network.config.vocab_size), np.float32)
        at_once = max(1, 16 * self.batch_tokens // len(ids))  # of a long protein not all copies
        for first in range(0, len(positions), at_once):
            group = positions[first : first + at_once]
            variants = [ids.copy() for _ in group]
            for variant, position in zip(variants, group, strict=True):
                variant[position] = self.vocabulary.mask
            views = [windows[best[position]]._replace(sequence=i) for i, position in enumerate(group)]
            for window, rows in self.log_probabilities(variants, views):
                found[first + window.sequence] = rows[group[window.sequence] - window.start]
        return found


def load_protein_model(
    cls: Any,
    model: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    activation_dtype: str | None = None,
    device: str | None = None,
    long: str = "error",
    batch_tokens: int | None = None,
    output: str | os.PathLike[str] | None = None,
    **hub: Any,
) -> ProteinModel:
    """The model and tokenizer of a Hub repository or a folder.

    Args:
        cls: what loads it: `MLXAutoModel` for `embed` and `contacts`, else `MLXAutoModelForMaskedLM`.
        dtype, activation_dtype: see `MLXPreTrainedModel.from_pretrained`.
        device: "cpu" or "gpu"; by default MLX's own choice.
        batch_tokens: None, as many as suit the device and fit into the memory that is free.
        output: of a run; one that stopped goes on with the batches that it had.
        hub: `token`, `cache_dir`, `subfolder`, `local_files_only` and `force_download` of `from_pretrained`, for both.

    Example:
        >>> load_protein_model(MLXAutoModel, "facebook/esm2_t6_8M_UR50D", long="window")
    """
    use_device(device)
    if batch_tokens is not None and batch_tokens < 1:
        raise UserError(f"batch_tokens={batch_tokens}: at least one is needed.")
    hub["revision"] = revision or "main"
    network = load_network(cls, model, dtype=dtype, activation_dtype=activation_dtype, **hub)
    for option, value in PLAIN.items():
        setattr(network.config, option, value)
    commit = same_commit(network)
    tokenizer = load_tokenizer(model, **hub | commit)
    wanted = batch_tokens or earlier_settings(output).get("batch_tokens", 0)
    loaded = ProteinModel(network.eval(), tokenizer, str(model), commit.get("revision", revision), long, wanted)
    loaded.batch_tokens = agreed(loaded.batch_tokens, wanted)
    return loaded


def agreed(batch_tokens: int, wanted: int) -> int:
    """The tokens of a batch, the same on all ranks: they have to cut the same batches, and those that do not write may
    not see the output.

    Args:
        batch_tokens: of this rank.
        wanted: by the caller or an earlier run; 0, by nobody.
    """
    decided = wanted > 0 or distributed.is_rank_0()
    return distributed.all_min(batch_tokens if decided else 1 << 30)


def load_network(cls: Any, model: str, **options: Any) -> Any:
    """Load a model without its tokenizer. Without a head, keys of a head in the checkpoint are expected and the pooler
    is not used, so neither is reported."""
    return cls.from_pretrained(model, report=cls is not MLXAutoModel, **options)


def same_commit(network: Any) -> dict[str, str]:
    """`revision` for a tokenizer to be that of the model's own commit, whatever was pushed meanwhile; empty for a model
    that is from no commit."""
    commit = getattr(network.config, "_commit_hash", None)
    return {"revision": commit} if commit else {}


def as_protein_model(
    cls: Any, model: str | os.PathLike[str] | ProteinModel, output: Any, loading: dict[str, Any]
) -> ProteinModel:
    """The model itself if it is one, else what `load_protein_model` makes of it.

    Raises:
        TypeError: options of loading for a model that is loaded.
    """
    if not isinstance(model, ProteinModel):
        return load_protein_model(cls, os.fspath(model), output=output, **loading)
    if loading:
        raise TypeError(f"{', '.join(loading)}: this is for `load_protein_model`, and the model is loaded already.")
    return model


def settings_of(model: Any) -> dict[str, Any]:
    """What results depend on, of a model with a network, a name, a revision and a number of tokens in a batch."""
    settings = {
        "model": model.name,
        "revision": model.revision,
        "weights": fingerprint(model.network),
        "dtype": str(model.network.dtype).removeprefix("mlx.core."),
        "device": device_name(),
        "batch_tokens": model.batch_tokens,
    }
    if has_int8_activations(model.network):
        settings["activation_dtype"] = "int8"
    return settings


def fingerprint(network: MLXPreTrainedModel) -> str:
    """A hash over up to 1,024 numbers of each parameter that a checkpoint gave: tells checkpoints apart, whatever they
    are called."""
    digest = hashlib.sha256()
    parameters: Any = tree_flatten(network.parameters())
    for name, parameter in sorted(parameters, key=lambda pair: pair[0]):
        if name in network.newly_initialized:
            continue
        flat = parameter.reshape(-1)
        sample = flat[:: -(-flat.size // 1024)].astype(mx.float32)
        digest.update(name.encode() + np.array(sample).tobytes())
    return digest.hexdigest()[:16]
