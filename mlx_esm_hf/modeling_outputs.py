"""What the models return: transformers' output classes, with `mx.array` in them.

Each supports attribute (`out.logits`), key (`out["logits"]`) and index (`out[0]`) access and `to_tuple()`; fields
that are None are left out of the last two. B is the batch, L the tokens, D the hidden size, H the heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from transformers.utils import ModelOutput


@dataclass
class MLXBaseModelOutput(ModelOutput):
    """Of the encoder, and of `MLXEsmcModel`: `last_hidden_state` [B, L, D]; `hidden_states`, one [B, L, D] for the
    embeddings and each layer; `attentions`, one [B, H, L, L] for each layer."""

    last_hidden_state: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None


@dataclass
class MLXBaseModelOutputWithPooling(ModelOutput):
    """Of `MLXEsmModel`: the encoder's output and `pooler_output` [B, D]."""

    last_hidden_state: mx.array | None = None
    pooler_output: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None


@dataclass
class MLXMaskedLMOutput(ModelOutput):
    """Of `MLXEsmForMaskedLM`: `loss` [] and `logits` [B, L, vocab_size]."""

    loss: mx.array | None = None
    logits: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None


@dataclass
class MLXSequenceClassifierOutput(ModelOutput):
    """Of `MLXEsmForSequenceClassification`: `loss` [] and `logits` [B, num_labels]."""

    loss: mx.array | None = None
    logits: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None


@dataclass
class MLXTokenClassifierOutput(ModelOutput):
    """Of `MLXEsmForTokenClassification`: `loss` [] and `logits` [B, L, num_labels]."""

    loss: mx.array | None = None
    logits: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None
