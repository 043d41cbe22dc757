"""A model with its tokenizer, as the jobs use it: proteins in batches through the network, long ones in windows."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mlx_esm_hf.data.batches import batches
from mlx_esm_hf.data.proteins import tokens
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.models.esm.modeling_esm import MLXEsmModel
from mlx_esm_hf.runs.run import earlier_settings
from mlx_esm_hf.runtime import memory

LONG = ("error", "truncate", "window")


class Span(NamedTuple):
    """A stretch of a protein's positions that goes through the model at once."""

    item: int
    start: int
    stop: int


class Forward(NamedTuple):
    """One batch: which stretch each row is, and what the model takes. The residues of a row begin at `first`."""

    spans: list[Span]
    input_ids: np.ndarray
    attention_mask: np.ndarray
    first: int


@dataclass
class Loaded:
    """A model, its tokenizer, and how to give proteins to it.

    Args:
        long: what becomes of a protein beyond the position table: "error", "truncate", or "window", overlapping pieces.
        batch_tokens: most tokens, with padding, of a batch.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str = ""
    revision: str | None = None
    long: str = "error"
    batch_tokens: int = 0  # as many as suit the device and fit

    def __post_init__(self) -> None:
        self.batch_tokens = self.batch_tokens or memory.batch_tokens(self.model.config.hidden_size)
        if self.long not in LONG:
            raise ValueError(f"long={self.long!r} is not one of {', '.join(LONG)}.")
        probe: Any = self.tokenizer("A")["input_ids"]
        self.vocabulary = self.tokenizer.get_vocab()
        place = probe.index(self.vocabulary["A"])
        self.before, self.after = probe[:place], probe[place + 1 :]

    @property
    def longest(self) -> int | None:
        """Most residues that the model has positions for; None where there is no end."""
        config = self.model.config
        if config.position_embedding_type != "absolute":
            return None
        return config.max_position_embeddings - config.pad_token_id - 1 - len(self.before) - len(self.after)

    @property
    def settings(self) -> dict[str, Any]:
        """What results depend on, for the manifest of a run."""
        return {
            "model": self.name,
            "revision": self.revision,
            "weights": fingerprint(self.model),
            "dtype": str(self.model.dtype).removeprefix("mlx.core."),
            "device": mx.default_device().type.name,
            "long": self.long,
            "batch_tokens": self.batch_tokens,
        }

    def ids(self, sequence: str) -> np.ndarray:
        """Token ids of a cleaned sequence, without <cls> and <eos>: one for each position, always.

        Raises:
            ValueError: a token that this model does not have.
        """
        try:
            return np.array([self.vocabulary[token] for token in tokens(sequence)], np.int32)
        except KeyError as error:
            raise ValueError(f"has {error}, which {self.name or 'this model'} has no token for") from None

    def fit(self, ids: np.ndarray) -> np.ndarray:
        """What is left of a sequence of ids: its beginning, if long proteins are truncated.

        Raises:
            ValueError: it is too long, and that is to be an error.
        """
        self.check_length(len(ids))
        return ids[: self.longest] if self.long == "truncate" else ids

    def check_length(self, length: int) -> None:
        """
        Raises:
            ValueError: a protein that is too long, if that is to be an error.
        """
        if self.long == "error" and self.longest is not None and length > self.longest:
            raise ValueError(
                f"has {length} residues, the position table of {self.name or 'this model'} ends at {self.longest}. "
                "Take --long truncate, --long window, or ESM-2, which has no such limit"
            )

    def spans(self, item: int, length: int) -> list[Span]:
        """The whole protein; where it is too long windows that overlap by half at least."""
        window = self.longest
        if window is None or length <= window:
            return [Span(item, 0, length)]
        count = 1 + -(-(length - window) // (window - window // 2))
        starts = [round(i * (length - window) / (count - 1)) for i in range(count)]
        return [Span(item, start, start + window) for start in starts]

    def forwards(self, sequences: Sequence[np.ndarray], spans: Sequence[Span]) -> Iterator[Forward]:
        """The spans of these sequences of ids in batches of like length."""
        before, after = len(self.before), len(self.after)
        lengths = [span.stop - span.start + before + after for span in spans]
        for rows in batches(lengths, self.batch_tokens):
            width = max(lengths[row] for row in rows)
            input_ids = np.full((len(rows), width), self.tokenizer.pad_token_id, np.int32)
            attention_mask = np.zeros((len(rows), width), np.int32)
            for line, row in enumerate(rows):
                item, start, stop = spans[row]
                input_ids[line, : lengths[row]] = [*self.before, *sequences[item][start:stop], *self.after]
                attention_mask[line, : lengths[row]] = 1
            # One token for each residue, and none of them padding.
            if ((input_ids != self.tokenizer.pad_token_id) != attention_mask).any():
                raise ValueError("A sequence holds the token for padding.")
            yield Forward([spans[row] for row in rows], input_ids, attention_mask, before)

    def log_probabilities(
        self, sequences: Sequence[np.ndarray], spans: Sequence[Span] | None = None
    ) -> Iterator[tuple[Span, np.ndarray]]:
        """For spans of sequences, by default all of each, log-probabilities [positions, vocabulary]; not in order."""
        if spans is None:
            spans = [span for item, ids in enumerate(sequences) for span in self.spans(item, len(ids))]
        for batch in self.forwards(sequences, spans):
            logits = self.model(batch.input_ids, batch.attention_mask).logits.astype(mx.float32)
            rows = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            for span, row in zip(batch.spans, rows, strict=True):
                yield span, row[batch.first : batch.first + span.stop - span.start]

    def blended_log_probabilities(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Those of each sequence at all of its positions: [positions, vocabulary], in float32."""
        parts: list[list[tuple[Span, np.ndarray]]] = [[] for _ in sequences]
        for span, rows in self.log_probabilities(sequences):
            parts[span.item].append((span, rows))
        return [blend(windows, len(ids)) for windows, ids in zip(parts, sequences, strict=True)]

    def masked_log_probabilities(self, ids: np.ndarray, positions: Sequence[int]) -> np.ndarray:
        """Log-probabilities at each of these positions while it, alone, is masked: [len(positions), vocabulary].

        Of a protein in windows, each position is seen in the one where it is farthest from the edges.
        """
        windows = self.spans(0, len(ids))
        weights = np.full((len(windows), len(ids)), -1, np.float32)
        for row, window in zip(weights, windows, strict=True):
            row[window.start : window.stop] = ramp(window, len(ids))
        best = weights.argmax(axis=0)
        found = np.empty((len(positions), self.model.config.vocab_size), np.float32)
        at_once = max(1, 16 * self.batch_tokens // len(ids))  # of a long protein not all copies
        for first in range(0, len(positions), at_once):
            group = positions[first : first + at_once]
            variants = [ids.copy() for _ in group]
            for variant, position in zip(variants, group, strict=True):
                variant[position] = self.tokenizer.mask_token_id
            spans = [windows[best[position]]._replace(item=row) for row, position in enumerate(group)]
            for span, rows in self.log_probabilities(variants, spans):
                found[first + span.item] = rows[group[span.item] - span.start]
        return found


def ramp(span: Span, length: int) -> np.ndarray:
    """How much each position of a window counts where windows overlap: less towards an edge that is no end."""
    places, full = np.arange(span.start, span.stop), span.stop - span.start
    left = np.where(span.start > 0, places - span.start + 1, full)
    right = np.where(span.stop < length, span.stop - places, full)
    return np.minimum(left, right).astype(np.float32)


def blend(parts: Sequence[tuple[Span, np.ndarray]], length: int) -> np.ndarray:
    """Arrays [positions, ...] of windows as one array [length, ...], weighted by `ramp` where they overlap.

    A single window is handed on as it is.
    """
    if len(parts) == 1:
        return parts[0][1]
    shape = (length, *parts[0][1].shape[1:])
    total, weights = np.zeros(shape, np.float32), np.zeros(length, np.float32)
    for span, values in parts:
        weight = ramp(span, length)
        total[span.start : span.stop] += values * weight.reshape(-1, *[1] * (values.ndim - 1))
        weights[span.start : span.stop] += weight
    return total / weights.reshape(-1, *[1] * (total.ndim - 1))


def load(
    cls: type[MLXPreTrainedModel],
    model: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    long: str = "error",
    batch_tokens: int | None = None,
    output: str | os.PathLike[str] | None = None,
) -> Loaded:
    """The model and tokenizer of a Hub repository or a folder.

    Args:
        device: "cpu" or "gpu"; by default MLX's own choice.
        batch_tokens: None, as many as suit the device and fit into the memory that is free.
        output: of a run; one that stopped goes on with the batches that it had.
    """
    if device is not None:
        if device not in ("cpu", "gpu"):
            raise ValueError(f"device={device!r} is not one of cpu, gpu.")
        mx.set_default_device(getattr(mx, device))
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"batch_tokens={batch_tokens}: at least one is needed.")
    options: dict[str, Any] = {"add_pooling_layer": False} if issubclass(cls, MLXEsmModel) else {}
    with quiet_about_heads(cls):
        network = cls.from_pretrained(model, revision=revision or "main", dtype=dtype, **options)
    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision or "main")
    commit = getattr(network.config, "_commit_hash", None) or revision
    batch_tokens = batch_tokens or earlier_settings(output).get("batch_tokens", 0)
    loaded = Loaded(network.eval(), tokenizer, str(model), commit, long, batch_tokens)
    group = mx.distributed.init()
    if group.size() > 1:  # the ranks have to cut the same batches; those that do not write may not see the output
        if group.rank() and batch_tokens == 0:
            loaded.batch_tokens = 1 << 30
        loaded.batch_tokens = mx.distributed.all_min(mx.array(loaded.batch_tokens), stream=mx.cpu).item()  # type: ignore
    return loaded


@contextlib.contextmanager
def quiet_about_heads(cls: type[MLXPreTrainedModel]) -> Iterator[None]:
    """A model without a head does not report that the checkpoint has one."""
    log = logging.getLogger(MLXPreTrainedModel.__module__)
    level = log.level
    if issubclass(cls, MLXEsmModel):
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def as_loaded(
    cls: type[MLXPreTrainedModel],
    model: str | os.PathLike[str] | Loaded,
    output: str | os.PathLike[str] | None,
    loading: dict[str, Any],
) -> Loaded:
    """The model itself if it is loaded, else what `load` makes of it.

    Raises:
        TypeError: options of loading for a model that is loaded.
    """
    if not isinstance(model, Loaded):
        return load(cls, os.fspath(model), output=output, **loading)
    if loading:
        raise TypeError(f"{', '.join(loading)}: this is for `load`, and the model is loaded already.")
    return model


def fingerprint(model: MLXPreTrainedModel) -> str:
    """A hash over up to 1,024 numbers of each parameter: tells checkpoints apart, whatever they are called."""
    digest = hashlib.sha256()
    parameters: Any = tree_flatten(model.parameters())
    for name, parameter in sorted(parameters, key=lambda pair: pair[0]):
        flat = parameter.reshape(-1)
        sample = flat[:: -(-flat.size // 1024)].astype(mx.float32)
        digest.update(name.encode() + np.array(sample).tobytes())
    return digest.hexdigest()[:16]
