"""ESMC (ESM Cambrian) in MLX, the protein language models that follow ESM-2.

Read from top to bottom it is the network: attention, feed-forward, layer, heads, and the four models. Modules and
parameters are named as in transformers' `models/esmc/modeling_esmc.py`, so a checkpoint's keys are parameter names.

Beside ESM-2: nothing is dropped or scaled in the embeddings, query and key are normalised, the feed-forward is SwiGLU,
there are no biases, each branch is divided before it is added, and a sequence may have several chains.

Source: EvolutionaryScale 2024, ESM Cambrian (https://evolutionaryscale.ai/blog/esm-cambrian); the published code. Query
and key norm: Dehghani et al. 2023 (arXiv:2302.05442). SwiGLU: Shazeer 2020 (arXiv:2002.05202).

In the shapes B is the batch, L the tokens, D the hidden size, H the heads, V the vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from transformers import PreTrainedConfig

from mlx_esm_hf import ops
from mlx_esm_hf.modeling_inputs import Tables, as_array, check_inputs, check_sequence_id, labels_at, to_numpy
from mlx_esm_hf.modeling_layers import Embedding, LayerNorm, checkpointed, first_token, linear
from mlx_esm_hf.modeling_losses import classification_loss, cross_entropy
from mlx_esm_hf.modeling_outputs import (
    MLXBaseModelOutput,
    MLXMaskedLMOutput,
    MLXSequenceClassifierOutput,
    MLXTokenClassifierOutput,
)
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.models.esmc.configuration_esmc import MLXEsmcConfig, as_mlx_config, check_config
from mlx_esm_hf.models.esmc.names import ORIGINAL, TRANSFORMERS

DEPTH = 36  # layers with which a branch is added as it is


def rotary_angles(config: MLXEsmcConfig, position_ids: mx.array) -> tuple[mx.array, mx.array]:
    """Cosines and sines of the rotary position embedding (Su et al. 2021), [B, L, head_dim / 2], float32."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = mx.array(1 / np.float32(config.rope_parameters["rope_theta"]) ** exponents)
    angles = position_ids[..., None].astype(mx.float32) * frequencies
    return mx.cos(angles), mx.sin(angles)


# The network


class MLXEsmcAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) from [B, L, D], or [1, T, D] of a packed batch, to the same shape.

    Query and key are normalised over the whole width, before they are split into heads and rotated.
    """

    def __init__(self, config: MLXEsmcConfig):
        super().__init__()
        D, bias = config.hidden_size, config.attention_bias
        self.num_attention_heads = config.num_attention_heads
        self.q_proj = linear(config, D, D, bias)
        self.k_proj = linear(config, D, D, bias)
        self.v_proj = linear(config, D, D, bias)
        self.o_proj = linear(config, D, D, bias)
        self.q_norm = LayerNorm(D, bias=False)
        self.k_norm = LayerNorm(D, bias=False)
        self.attention_dropout = config.attention_dropout or 0
        self.dropout = nn.Dropout(self.attention_dropout)

    def __call__(
        self,
        hidden_states: mx.array,
        layout: ops.Layout | None = None,
        position_embeddings: tuple[mx.array, mx.array] | None = None,
        output_attentions: bool = False,
        residual: mx.array | None = None,
        output_scale: float = 1.0,
    ) -> tuple[mx.array, mx.array | None]:
        """The states [B, L, D] times `output_scale`, plus `residual`; the probabilities [B, H, L, L] if
        they are asked for.

        Args:
            layout: which tokens see which; None, all of a row.
            position_embeddings: cosines and sines of the rotary angles, [B, L, head_dim / 2] each.
        """
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if not output_attentions and not (self.training and self.attention_dropout):
            # What follows below, in one operation.
            norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
            context = ops.attention(
                query, key, value, self.num_attention_heads, layout, position_embeddings, norms=norms
            )
            return self.o_proj(context, residual=residual, output_scale=output_scale), None

        query, key = self.q_norm(query), self.k_norm(key)
        heads = ops.split_heads(query, key, value, self.num_attention_heads, layout, position_embeddings)
        attentions = self.dropout(ops.attention_probabilities(heads.query, heads.key, heads.mask))
        context = ops.merge_heads(attentions @ heads.value)
        return self.o_proj(
            context, residual=residual, output_scale=output_scale
        ), attentions if output_attentions else None


class MLXEsmcMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) times `output_scale`, plus `residual`, [B, L, D] to [B, L, D]."""

    def __init__(self, config: MLXEsmcConfig):
        super().__init__()
        D, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = linear(config, D, width, bias)
        self.up_proj = linear(config, D, width, bias)
        self.down_proj = linear(config, width, D, bias)

    def __call__(
        self, hidden_states: mx.array, residual: mx.array | None = None, output_scale: float = 1.0
    ) -> mx.array:
        gated = ops.swiglu(self.gate_proj(hidden_states), self.up_proj(hidden_states))
        return self.down_proj(gated, residual=residual, output_scale=output_scale)


class MLXEsmcLayer(nn.Module):
    """A transformer layer, [B, L, D] to [B, L, D], with the layer norms before attention and feed-forward. Each of the
    two is divided by √(layers / 36) before it is added."""

    def __init__(self, config: MLXEsmcConfig):
        super().__init__()
        self.self_attn = MLXEsmcAttention(config)
        self.mlp = MLXEsmcMLP(config)
        self.input_layernorm = LayerNorm(config.hidden_size)
        self.post_attention_layernorm = LayerNorm(config.hidden_size)
        self.branch_scale = math.sqrt(DEPTH / config.num_hidden_layers)

    def __call__(
        self,
        hidden_states: mx.array,
        layout: ops.Layout | None = None,
        position_embeddings: tuple[mx.array, mx.array] | None = None,
        output_attentions: bool = False,
    ) -> tuple[mx.array, mx.array | None]:
        hidden_states, attentions = self.self_attn(
            self.input_layernorm(hidden_states),
            layout,
            position_embeddings,
            output_attentions,
            residual=hidden_states,
            output_scale=self.branch_scale,
        )
        normed = self.post_attention_layernorm(hidden_states)
        return self.mlp(normed, residual=hidden_states, output_scale=self.branch_scale), attentions


class MLXEsmcMaskedLMHead(nn.Module):
    """Scores over the vocabulary, [..., D] to [..., V]: dense, GELU, layer norm, projection."""

    def __init__(self, config: MLXEsmcConfig):
        super().__init__()
        self.dense = linear(config, config.hidden_size, config.hidden_size)
        self.layer_norm = LayerNorm(config.hidden_size)
        self.decoder = linear(config, config.hidden_size, config.vocab_size)

    def __call__(self, hidden_states: mx.array) -> mx.array:
        return self.decoder(self.layer_norm(ops.gelu(self.dense(hidden_states))))


class MLXEsmcClassificationHead(nn.Module):
    """Scores of a whole sequence from the state of <cls>: [B, L, D] to [B, num_labels]."""

    def __init__(self, config: MLXEsmcConfig):
        super().__init__()
        self.dense = linear(config, config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout or 0)
        self.out_proj = linear(config, config.hidden_size, config.num_labels)

    def __call__(self, features: mx.array, attention_mask: mx.array | None = None) -> mx.array:
        x = self.dropout(first_token(features, attention_mask))
        x = self.dropout(mx.tanh(self.dense(x)))
        return self.out_proj(x)


# The models


class MLXEsmcPreTrainedModel(MLXPreTrainedModel):
    """What the models of the family have in common: how their checkpoints look."""

    config_class = MLXEsmcConfig
    base_model_prefix = "esmc"
    dialects = (TRANSFORMERS, ORIGINAL)
    required = ("embed_tokens.", "layers.", "norm.")
    quantized = ("layers.",)
    adapted = ("q_proj", "k_proj", "v_proj")
    input_embeddings = "embed_tokens"
    residues = {residue: 4 + place for place, residue in enumerate("LAGVSERTIDPKQNFYMHWCXBUZO")}

    def __init__(self, config: PreTrainedConfig):
        config = as_mlx_config(config)
        check_config(config)
        super().__init__(config)
        self.config: MLXEsmcConfig


class MLXEsmcModel(MLXEsmcPreTrainedModel):
    """ESMC without a head: hidden states and attentions.

    Args:
        config: an `MLXEsmcConfig` or transformers' `EsmcConfig`.

    Example:
        >>> model = MLXEsmcModel.from_pretrained("biohub/ESMC-300M")
        >>> inputs = tokenizer(["MKTAYIAKQR"], return_tensors="mlx")
        >>> model(**inputs).last_hidden_state.shape
        (1, 12, 960)
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        config = self.config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.embed_tokens.weight = mx.random.normal(self.embed_tokens.weight.shape, scale=config.initializer_range)
        self.layers = [MLXEsmcLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = LayerNorm(config.hidden_size, bias=False)
        self.gradient_checkpointing = False

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        sequence_id: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MLXBaseModelOutput | tuple:
        """
        Args:
            input_ids: [B, L] token ids, as `mx.array`, NumPy, lists or torch tensors (all arguments alike).
            attention_mask: [B, L], 1 for tokens, 0 for padding.
            position_ids: [B, L] or [1, L]; by default 0 to L − 1, across chains as well.
            sequence_id: [B, L], the number of each token's chain; tokens of one chain see each other and no others.
                −1 is padding, and `attention_mask` is not read.
            output_attentions, output_hidden_states, return_dict: by default the config's.

        At padding the outputs are finite and otherwise unspecified.

        Raises:
            ValueError: ids outside the vocabulary, an empty batch, a mask or chains of another shape. Checked where
                the values are at hand, not while the call is being traced.
        """
        outputs, layout = self.run_encoder(
            input_ids, attention_mask, position_ids, sequence_id, output_attentions, output_hidden_states
        )
        outputs.last_hidden_state = layout.unpack(outputs.last_hidden_state).astype(self.dtype)
        return outputs if self.returns_dict(return_dict) else outputs.to_tuple()

    def run_encoder(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        sequence_id: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        labels: Any = None,
    ) -> tuple[Any, ops.Layout]:
        """The output, as a head goes on with it, and the layout of the batch.

        Args:
            labels: [B, L]. Where some at padding take part in the loss padding is computed, as in transformers.

        Returns:
            An `MLXBaseModelOutput`, whose `last_hidden_state` may be packed, [1, T, D]: the layout's `unpack` brings
            it, or what a head has made of it, to [B, L, ...], and it has the dtype that states are computed in. Hidden
            states and attentions are those of the batch, in the network's.
        """
        config = self.config
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        keep_padding = output_attentions or bool(self.training and config.attention_dropout)
        hidden_states, layout, position_embeddings = self.embed(
            input_ids, attention_mask, position_ids, sequence_id, keep_padding, labels
        )
        # Only what is asked for is held: a reference to each layer's output would keep all of them in memory.
        all_hidden_states: list[mx.array] = []
        all_attentions: list[Any] = []
        for layer in self.layers:
            if output_hidden_states:
                all_hidden_states.append(layout.unpack(hidden_states).astype(self.dtype))
            if self.gradient_checkpointing and self.training and not output_attentions:
                hidden_states, attentions = checkpointed(layer, layout, position_embeddings)(hidden_states), None
            else:
                hidden_states, attentions = layer(hidden_states, layout, position_embeddings, output_attentions)
            all_attentions.append(attentions if attentions is None else attentions.astype(self.dtype))
        hidden_states = self.norm(hidden_states)
        if output_hidden_states:  # the last one is behind the layer norm
            all_hidden_states.append(layout.unpack(hidden_states).astype(self.dtype))
        outputs = MLXBaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )
        return outputs, layout

    def embed(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        sequence_id: Any = None,
        keep_padding: bool = False,
        labels: Any = None,
    ) -> tuple[mx.array, ops.Layout, tuple[mx.array, mx.array]]:
        """What the layers take: the embeddings in their layout, and the rotary angles of each token.

        Args:
            keep_padding: compute padding, too. So it is where some of it has a label.
        """
        config = self.config
        tables = Tables(config.vocab_size, config.hidden_size, config.pad_token_id)
        attention_mask = attention_mask if sequence_id is None else None
        inputs = check_inputs(input_ids, attention_mask, position_ids, None, tables)
        mask, values, chains = inputs.attention_mask, inputs.mask_values, None
        if sequence_id is not None:
            chains = check_sequence_id(sequence_id, inputs.shape)
            mask = chains >= 0
            values = to_numpy(mask)
        hidden_states = self.embed_tokens(inputs.input_ids)
        hidden_states = hidden_states.astype(ops.computing_dtype(hidden_states.dtype))
        if values is not None:
            keep_padding = keep_padding or labels_at(labels, values == 0)
        layout = ops.choose_layout(inputs.shape, mask, values, self.dtype, keep_padding, chains)
        positions = mx.arange(inputs.shape[1]) if inputs.position_ids is None else inputs.position_ids
        position_embeddings = rotary_angles(config, layout.pack(mx.broadcast_to(positions, inputs.shape)))
        return layout.pack(hidden_states), layout, position_embeddings


class MLXEsmcForMaskedLM(MLXEsmcPreTrainedModel):
    """ESMC with its language-model head.

    Example:
        >>> model = MLXEsmcForMaskedLM.from_pretrained("biohub/ESMC-300M")
        >>> inputs = tokenizer("MKT<mask>YIAKQR", return_tensors="mlx")
        >>> tokenizer.decode(model(**inputs).logits[0, 4].argmax().tolist())
    """

    output_embeddings = "lm_head.decoder"
    vocabulary_biases = ("lm_head.decoder.bias",)

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.esmc = MLXEsmcModel(self.config)
        self.lm_head = MLXEsmcMaskedLMHead(self.config)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        sequence_id: Any = None,
        labels: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MLXMaskedLMOutput | tuple:
        """
        Args:
            labels: [B, L] token ids; −100 is left out of the loss, which is the mean cross-entropy, in float32.

        The other arguments are those of `MLXEsmcModel`.

        Raises:
            ValueError: the checkpoint had no language-model head, and it is neither trained nor given labels.
        """
        if labels is None and not self.training:
            self.refuse_untrained("lm_head", "predicting residues")
        outputs, layout = self.esmc.run_encoder(
            input_ids, attention_mask, position_ids, sequence_id, output_attentions, output_hidden_states, labels
        )
        logits = layout.unpack(self.lm_head(outputs.last_hidden_state)).astype(self.dtype)
        output = MLXMaskedLMOutput(
            loss=None if labels is None else cross_entropy(logits.astype(mx.float32), labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if self.returns_dict(return_dict) else output.to_tuple()


class MLXEsmcForSequenceClassification(MLXEsmcPreTrainedModel):
    """ESMC with a classifier or regressor over the whole sequence, on the state of its <cls> token."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = self.config.num_labels
        self.esmc = MLXEsmcModel(self.config)
        self.classifier = MLXEsmcClassificationHead(self.config)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        sequence_id: Any = None,
        labels: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MLXSequenceClassifierOutput | tuple:
        """
        Args:
            labels: see `modeling_losses.classification_loss`.

        The other arguments are those of `MLXEsmcModel`. A left-padded row is read at its first real token.
        """
        outputs, layout = self.esmc.run_encoder(
            input_ids, attention_mask, position_ids, sequence_id, output_attentions, output_hidden_states
        )
        real = as_array(attention_mask) if sequence_id is None else as_array(sequence_id) >= 0
        logits = self.classifier(layout.unpack(outputs.last_hidden_state), real).astype(self.dtype)
        output = MLXSequenceClassifierOutput(
            loss=None if labels is None else classification_loss(self.config, logits, as_array(labels)),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if self.returns_dict(return_dict) else output.to_tuple()


class MLXEsmcForTokenClassification(MLXEsmcPreTrainedModel):
    """ESMC with a classifier over each token, such as for secondary structure."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = self.config.num_labels
        self.esmc = MLXEsmcModel(self.config)
        self.dropout = nn.Dropout(0.1 if self.config.classifier_dropout is None else self.config.classifier_dropout)
        self.score = linear(self.config, self.config.hidden_size, self.num_labels)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        sequence_id: Any = None,
        labels: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MLXTokenClassifierOutput | tuple:
        """
        Args:
            labels: [B, L] classes; −100 is left out of the loss, which is the mean cross-entropy, in float32.

        The other arguments are those of `MLXEsmcModel`.
        """
        outputs, layout = self.esmc.run_encoder(
            input_ids, attention_mask, position_ids, sequence_id, output_attentions, output_hidden_states, labels
        )
        logits = layout.unpack(self.score(self.dropout(outputs.last_hidden_state))).astype(self.dtype)
        output = MLXTokenClassifierOutput(
            loss=None if labels is None else cross_entropy(logits.astype(mx.float32), labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if self.returns_dict(return_dict) else output.to_tuple()
