"""The ESM protein language models in MLX: ESM-1, ESM-1b, ESM-1v and ESM-2.

Read from top to bottom it is the network: embeddings, attention, layer, encoder, heads, and the four models. Modules
and parameters are named as in transformers' `models/esm/modeling_esm.py`, so a checkpoint's keys are parameter names.
What differs between the families stands in the config.

Papers: Rives et al. 2019 (ESM-1, ESM-1b; PNAS 2021, doi:10.1073/pnas.2016239118), Rao et al. 2020 (contacts;
doi:10.1101/2020.12.15.422761), Meier et al. 2021 (ESM-1v; doi:10.1101/2021.07.09.450648), Lin et al. 2023 (ESM-2;
Science, doi:10.1126/science.ade2574).

In the shapes B is the batch, L the tokens, D the hidden size, H the heads, V the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from transformers import PreTrainedConfig

from mlx_esm_hf import ops
from mlx_esm_hf.checkpoint.names import Dialect
from mlx_esm_hf.modeling_inputs import Tables, as_array, check_inputs, labels_at, to_numpy
from mlx_esm_hf.modeling_layers import Embedding, LayerNorm, checkpointed, dequantized_weight, first_token, linear
from mlx_esm_hf.modeling_losses import classification_loss, cross_entropy
from mlx_esm_hf.modeling_outputs import (
    MLXBaseModelOutput,
    MLXBaseModelOutputWithPooling,
    MLXMaskedLMOutput,
    MLXSequenceClassifierOutput,
    MLXTokenClassifierOutput,
)
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.models.esm.configuration_esm import MLXEsmConfig, as_mlx_config, check_config
from mlx_esm_hf.models.esm.names import FAIR_ESM, FAIR_ESM_1, TRANSFORMERS_4, TRANSFORMERS_5
from mlx_esm_hf.runtime.memory import evaluate

# The share of residues that ESM's training replaced by <mask>: 15% were selected, 80% of those masked.
MASK_RATIO_TRAIN = 0.15 * 0.8

# Elements of attention maps that the contact head takes in together, 16 MB: many heads of a short protein, one of a
# long one.
MAPS_AT_A_TIME = 1 << 22


def embedding(config: MLXEsmConfig, size: int) -> Embedding:
    """An embedding table under transformers' initialisation: normal, the row of the padding token zero."""
    table = Embedding(size, config.hidden_size)
    table.weight = mx.random.normal((size, config.hidden_size), scale=config.initializer_range)
    if config.pad_token_id is not None:
        table.weight[config.pad_token_id] = 0
    return table


def layer_norm(config: MLXEsmConfig) -> LayerNorm:
    """Layer norm over the hidden size."""
    return LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


# Positions


class MLXEsmRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary position embedding (Su et al. 2021), [B, L, head_dim / 2].

    `inv_freq` is a buffer: it is loaded and saved, but never trained and never rounded to half precision. The stored
    values are used, since a checkpoint may have been trained with rounded ones.
    """

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        head_dim = config.hidden_size // config.num_attention_heads
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        self.inv_freq = mx.array(1 / np.float32(config.rope_theta) ** exponents)

    @property
    def _no_grad(self) -> set[str]:
        """Frozen for good: `unfreeze` of a whole model empties the sets of its modules."""
        return {"inv_freq"}

    @_no_grad.setter
    def _no_grad(self, names: set[str]) -> None:
        pass

    def __call__(self, position_ids: mx.array) -> tuple[mx.array, mx.array]:
        # One float32 product, as in transformers: at position 1000 another order of rounding is visible.
        angles = position_ids[..., None].astype(mx.float32) * self.inv_freq.astype(mx.float32)
        return mx.cos(angles), mx.sin(angles)


def sinusoidal_positions(position_ids: mx.array, hidden_size: int, padding_idx: int) -> mx.array:
    """ESM-1's position embedding [B, L, D]: sines, then cosines, zero at padding (fair-esm's
    `SinusoidalPositionalEmbedding`)."""
    half = hidden_size // 2
    # The exponent is rounded to float32 before the exponential, as it was in training.
    exponents = np.arange(half, dtype=np.float32) * np.float32(-math.log(10000) / (half - 1))
    angles = position_ids[..., None].astype(mx.float32) * mx.array(np.exp(exponents.astype(np.float64)), mx.float32)
    positions = mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1)
    if hidden_size % 2:
        positions = mx.pad(positions, [(0, 0), (0, 0), (0, 1)])
    return mx.where((position_ids == padding_idx)[..., None], 0.0, positions)


def create_position_ids_from_input_ids(input_ids: mx.array, padding_idx: int) -> mx.array:
    """Positions count the real tokens from padding_idx + 1; padding stays at padding_idx. [B, L]"""
    real = (input_ids != padding_idx).astype(mx.int32)
    return mx.cumsum(real, axis=1) * real + padding_idx


# The network


class MLXEsmEmbeddings(nn.Module):
    """Token ids [B, L] to vectors [B, L, D], zero at padding: words under token dropout, positions where they are not
    rotary, layer norm. They have the dtype that states are computed in (`ops.computing_dtype`)."""

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        self.config = config
        self.word_embeddings = embedding(config, config.vocab_size)
        if config.position_embedding_type == "absolute":
            self.position_embeddings = embedding(config, config.max_position_embeddings)
        if config.emb_layer_norm_before:
            self.layer_norm = layer_norm(config)

    def __call__(
        self, input_ids: mx.array, attention_mask: mx.array | None = None, position_ids: mx.array | None = None
    ) -> mx.array:
        config = self.config
        embeddings = self.word_embeddings(input_ids)
        embeddings = embeddings.astype(ops.computing_dtype(embeddings.dtype))
        if config.scale_embedding:
            embeddings = embeddings * math.sqrt(config.hidden_size)
        if config.token_dropout:
            embeddings = self.drop_tokens(embeddings, input_ids, attention_mask)

        if config.position_embedding_type != "rotary":
            if position_ids is None:
                position_ids = create_position_ids_from_input_ids(input_ids, config.pad_token_id)
            if config.position_embedding_type == "absolute":
                embeddings = embeddings + self.position_embeddings(position_ids)
            else:
                positions = sinusoidal_positions(position_ids, config.hidden_size, config.pad_token_id)
                embeddings = embeddings + positions.astype(embeddings.dtype)

        if config.emb_layer_norm_before:
            embeddings = self.layer_norm(embeddings)
        if attention_mask is not None:
            embeddings = embeddings * attention_mask[..., None].astype(embeddings.dtype)
        return embeddings

    def drop_tokens(self, embeddings: mx.array, input_ids: mx.array, attention_mask: mx.array | None) -> mx.array:
        """Zero the <mask> tokens, and scale the others to the share of tokens that training left unmasked.

        A row in which nothing is left has nothing to scale; there transformers divides zero by zero.
        """
        masked = input_ids == self.config.mask_token_id
        length = input_ids.shape[1] if attention_mask is None else attention_mask.sum(axis=-1)
        left = mx.maximum(length - masked.sum(axis=-1), 1)
        scale = (1 - MASK_RATIO_TRAIN) * length / left
        embeddings = mx.where(masked[..., None], 0, embeddings)
        return embeddings * scale[:, None, None].astype(embeddings.dtype)


class MLXEsmSelfAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) from [B, L, D], or [1, T, D] of a packed batch, to the same shape.

    ESM-1 has a learned key and value, `bias_k` and `bias_v`, beside those of the tokens.
    """

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        D = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.query = linear(config, D, D)
        self.key = linear(config, D, D)
        self.value = linear(config, D, D)
        self.attention_dropout = config.attention_probs_dropout_prob or 0
        self.dropout = nn.Dropout(self.attention_dropout)
        if config.add_bias_kv:
            self.bias_k = mx.random.normal((1, 1, D), scale=D**-0.5)
            self.bias_v = mx.random.normal((1, 1, D), scale=D**-0.5)

    def __call__(
        self,
        hidden_states: mx.array,
        layout: ops.Layout | None = None,
        position_embeddings: tuple[mx.array, mx.array] | None = None,
        output_attentions: bool = False,
    ) -> tuple[mx.array, mx.array | None]:
        """The context [B, L, D], and the probabilities [B, H, L, L] if they are asked for.

        Args:
            layout: which tokens see which; None, all of a row.
            position_embeddings: cosines and sines of the rotary angles, [B, L, head_dim / 2] each.
        """
        query, key, value = self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)
        bias_kv = (self.bias_k, self.bias_v) if "bias_k" in self else None
        if not output_attentions and not (self.training and self.attention_dropout):
            # What follows below, in one operation.
            context = ops.attention(query, key, value, self.num_attention_heads, layout, position_embeddings, bias_kv)
            return context, None

        heads = ops.split_heads(query, key, value, self.num_attention_heads, layout, position_embeddings, bias_kv)
        attentions = self.dropout(ops.attention_probabilities(heads.query, heads.key, heads.mask))
        context = ops.merge_heads(attentions @ heads.value)
        if "bias_k" in self:
            attentions = attentions[..., :-1]  # the learned key is no token
        return context, attentions if output_attentions else None


class MLXEsmOutput(nn.Module):
    """The projection back to the hidden size, and the residual: behind attention and behind the feed-forward."""

    def __init__(self, config: MLXEsmConfig, inputs: int):
        super().__init__()
        self.dense = linear(config, inputs, config.hidden_size)
        self.hidden_dropout = config.hidden_dropout_prob or 0
        self.dropout = nn.Dropout(self.hidden_dropout)

    def __call__(self, hidden_states: mx.array, input_tensor: mx.array) -> mx.array:
        if self.training and self.hidden_dropout:
            return self.dropout(self.dense(hidden_states)) + input_tensor
        return self.dense(hidden_states, residual=input_tensor)


class MLXEsmAttention(nn.Module):
    """Layer norm, attention, projection and residual: [B, L, D] to [B, L, D]."""

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        self.self = MLXEsmSelfAttention(config)
        self.output = MLXEsmOutput(config, config.hidden_size)
        self.LayerNorm = layer_norm(config)

    def __call__(
        self,
        hidden_states: mx.array,
        layout: ops.Layout | None = None,
        position_embeddings: tuple[mx.array, mx.array] | None = None,
        output_attentions: bool = False,
    ) -> tuple[mx.array, mx.array | None]:
        context, attentions = self.self(self.LayerNorm(hidden_states), layout, position_embeddings, output_attentions)
        return self.output(context, hidden_states), attentions


class MLXEsmIntermediate(nn.Module):
    """The first half of the feed-forward: [B, L, D] to [B, L, intermediate_size], through GELU."""

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        self.dense = linear(config, config.hidden_size, config.intermediate_size)

    def __call__(self, hidden_states: mx.array) -> mx.array:
        if self.training:  # its gradient needs what goes into GELU, which the fused operation does not keep
            return ops.gelu(self.dense(hidden_states))
        return self.dense(hidden_states, activation="gelu")


class MLXEsmLayer(nn.Module):
    """A transformer layer, [B, L, D] to [B, L, D], with the layer norms before attention and feed-forward."""

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        self.attention = MLXEsmAttention(config)
        self.intermediate = MLXEsmIntermediate(config)
        self.output = MLXEsmOutput(config, config.intermediate_size)
        self.LayerNorm = layer_norm(config)

    def __call__(
        self,
        hidden_states: mx.array,
        layout: ops.Layout | None = None,
        position_embeddings: tuple[mx.array, mx.array] | None = None,
        output_attentions: bool = False,
    ) -> tuple[mx.array, mx.array | None]:
        hidden_states, attentions = self.attention(hidden_states, layout, position_embeddings, output_attentions)
        return self.output(self.intermediate(self.LayerNorm(hidden_states)), hidden_states), attentions


class MLXEsmEncoder(nn.Module):
    """The layers, and the layer norm behind the last one: [B, L, D], or [1, T, D] of a packed batch, to the same."""

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        self.layer = [MLXEsmLayer(config) for _ in range(config.num_hidden_layers)]
        self.gradient_checkpointing = False
        if config.emb_layer_norm_after:
            self.emb_layer_norm_after = layer_norm(config)

    def __call__(
        self,
        hidden_states: mx.array,
        layout: ops.Layout | None = None,
        position_embeddings: tuple[mx.array, mx.array] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> MLXBaseModelOutput:
        # Only what is asked for is held: a reference to each layer's output would keep all of them in memory.
        all_hidden_states = [hidden_states]
        all_attentions: list[Any] = []
        outputs = self.layers(hidden_states, layout, position_embeddings, output_attentions)
        for hidden_states, attentions in outputs:
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            all_attentions.append(attentions)
        if "emb_layer_norm_after" in self:
            hidden_states = self.emb_layer_norm_after(hidden_states)
        all_hidden_states[-1] = hidden_states  # the last one is behind the layer norm
        return MLXBaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )

    def layers(
        self,
        hidden_states: mx.array,
        layout: ops.Layout | None,
        position_embeddings: tuple[mx.array, mx.array] | None,
        output_attentions: bool,
    ) -> Iterator[tuple[mx.array, mx.array | None]]:
        """The output of one layer after the other, [B, L, D], and its attentions [B, H, L, L], or None."""
        for layer in self.layer:
            if self.gradient_checkpointing and self.training and not output_attentions:
                hidden_states, attentions = checkpointed(layer, layout, position_embeddings)(hidden_states), None
            else:
                hidden_states, attentions = layer(hidden_states, layout, position_embeddings, output_attentions)
            yield hidden_states, attentions


class MLXEsmPooler(nn.Module):
    """A dense layer and tanh on the state of <cls>: [B, L, D] to [B, D]."""

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        self.dense = linear(config, config.hidden_size, config.hidden_size)

    def __call__(self, hidden_states: mx.array, attention_mask: mx.array | None = None) -> mx.array:
        return mx.tanh(self.dense(first_token(hidden_states, attention_mask)))


def symmetrize(x: mx.array) -> mx.array:
    """Each map [..., L, L] plus its transpose."""
    return x + x.swapaxes(-1, -2)


def average_product_correct(x: mx.array) -> mx.array:
    """Take the product of row and column sums, over the total, from each map [..., L, L] (Dunn et al. 2008)."""
    rows, columns = x.sum(axis=-1, keepdims=True), x.sum(axis=-2, keepdims=True)
    total = rows.sum(axis=-2, keepdims=True)  # of the sums: L² numbers added one by one lose digits
    return x - rows * columns / mx.where(total == 0, 1, total)


class MLXEsmContactPredictionHead(nn.Module):
    """Logistic regression on all attention maps, symmetrised and corrected (Rao et al. 2020)."""

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.num_layers = config.num_hidden_layers
        self.regression = linear(config, config.num_hidden_layers * config.num_attention_heads, 1)

    def __call__(self, tokens: mx.array, attentions: Iterable[mx.array]) -> mx.array:
        """Contact probabilities [B, residues, residues].

        Args:
            tokens: [B, L].
            attentions: [B, H, L, L] of each layer, zero at padding. They are taken one by one, and those of an
                iterator need not be in memory together.
        """
        residues = slice(1, None)
        real = mx.ones(tokens.shape, dtype=mx.bool_)
        if self.eos_token_id is not None:
            real = tokens != self.eos_token_id
            residues = slice(1, -1)
        pairs = (real[:, None, :, None] & real[:, None, None, :])[..., residues, residues]
        weights = mx.split(dequantized_weight(self.regression).reshape(-1, 1, 1), self.num_layers)
        logits = self.regression.bias
        B, L = tokens.shape
        at_once = max(1, MAPS_AT_A_TIME // (B * L * L))
        for attention, weight in zip(attentions, weights, strict=True):
            # Left to itself, MLX has the maps of many layers in memory at a time, and several steps of each.
            evaluate(attention)
            for first in range(0, attention.shape[1], at_once):
                heads = slice(first, first + at_once)
                maps = mx.where(pairs, attention[:, heads, residues, residues], 0)
                logits = logits + (average_product_correct(symmetrize(maps)) * weight[heads]).sum(axis=1)
                evaluate(logits)
        return mx.sigmoid(logits)


class MLXEsmLMHead(nn.Module):
    """Scores over the vocabulary, [..., D] to [..., V]; ESM-1 projects directly, the others through a dense layer."""

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        if config.lm_head_transform:
            self.dense = linear(config, config.hidden_size, config.hidden_size)
            self.layer_norm = layer_norm(config)
        self.decoder: Any = None  # tied by the model, which has the embedding
        if not config.tie_word_embeddings:
            self.decoder = linear(config, config.hidden_size, config.vocab_size, bias=False)
        if config.lm_head_bias:
            self.bias = mx.zeros(config.vocab_size)

    def __call__(self, features: mx.array) -> mx.array:
        if "dense" in self:
            features = self.layer_norm(ops.gelu(self.dense(features)))
        scores = self.decoder(features)
        return scores + self.bias if "bias" in self else scores


class MLXEsmClassificationHead(nn.Module):
    """Scores of a whole sequence from the state of <cls>: [B, L, D] to [B, num_labels]."""

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        self.dense = linear(config, config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob or 0)
        self.out_proj = linear(config, config.hidden_size, config.num_labels)

    def __call__(self, features: mx.array, attention_mask: mx.array | None = None) -> mx.array:
        x = self.dropout(first_token(features, attention_mask))
        x = self.dropout(mx.tanh(self.dense(x)))
        return self.out_proj(x)


# The models


class MLXEsmPreTrainedModel(MLXPreTrainedModel):
    """What the models of the family have in common: how their checkpoints look, and contacts."""

    config_class = MLXEsmConfig
    base_model_prefix = "esm"
    dialects: ClassVar[tuple[Dialect, ...]] = (TRANSFORMERS_4, TRANSFORMERS_5, FAIR_ESM, FAIR_ESM_1)
    buffers: ClassVar[tuple[str, ...]] = ("rotary_embeddings.inv_freq",)
    required: ClassVar[tuple[str, ...]] = ("embeddings.", "encoder.")
    without_loss = ("contact_head.",)
    quantized: ClassVar[tuple[str, ...]] = ("encoder.",)
    adapted = ("query", "key", "value")
    input_embeddings = "embeddings.word_embeddings"
    folds: ClassVar[bool] = False
    residues = {residue: 4 + place for place, residue in enumerate("LAGVSERTIDPKQNFYMHWCXBUZO")}

    def __init__(self, config: PreTrainedConfig):
        config = as_mlx_config(config)
        check_config(config, self.folds)
        super().__init__(config)
        self.config: MLXEsmConfig

    @property
    def max_tokens(self) -> int | None:
        """The tokens that a learned table has positions for; the positions of the other families have no end."""
        if self.config.position_embedding_type != "absolute":
            return None
        return self.config.max_position_embeddings - self.config.pad_token_id - 1

    def predict_contacts(self, tokens: Any, attention_mask: Any) -> mx.array:
        """Contact probabilities of residue pairs.

        Args:
            tokens: [B, L] token ids.
            attention_mask: [B, L], 1 for tokens and 0 for padding, on either side: the map of a left-padded row is
                that of the same row padded on the right (transformers' is shifted).

        Returns:
            [B, residues, residues], where residues is L without <cls> and, except in ESM-1, <eos>.

        Raises:
            ValueError: the checkpoint had no contact head.

        Source: Rao et al. 2020; `EsmModel.predict_contacts`.
        """
        base = self.base_model
        base.refuse_untrained("contact_head", "contact prediction")
        tokens, mask = as_array(tokens), as_array(attention_mask).astype(mx.bool_)
        hidden_states, layout, position_embeddings = base.embed(tokens, attention_mask, keep_padding=True)

        # Rows that are padded on the left are turned until <cls> is first.
        first = mx.argmax(mask.astype(mx.int32), axis=1)
        starts = to_numpy(first)
        turned = starts is None or starts.any()
        order = (mx.arange(tokens.shape[1]) + first[:, None]) % tokens.shape[1]
        real = mask[:, None, :, None] & mask[:, None, None, :]

        def attentions() -> Iterator[mx.array]:
            for _, attention in base.encoder.layers(hidden_states, layout, position_embeddings, True):
                attention = mx.where(real, attention, 0)
                if turned:
                    attention = mx.take_along_axis(attention, order[:, None, :, None], axis=2)
                    attention = mx.take_along_axis(attention, order[:, None, None, :], axis=3)
                yield attention

        if turned:
            tokens = mx.take_along_axis(tokens, order, axis=1)
        return base.contact_head(tokens, attentions()).astype(self.dtype)


class MLXEsmModel(MLXEsmPreTrainedModel):
    """ESM without a head: hidden states, a pooled state, attentions and contacts.

    Args:
        config: an `MLXEsmConfig`, `MLXEsm1Config` or transformers' `EsmConfig`.
        add_pooling_layer: have a `pooler`.

    Example:
        >>> model = MLXEsmModel.from_pretrained("facebook/esm2_t6_8M_UR50D")
        >>> inputs = tokenizer(["MKTAYIAKQR"], return_tensors="mlx")
        >>> model(**inputs).last_hidden_state.shape
        (1, 12, 320)
    """

    def __init__(self, config: PreTrainedConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = MLXEsmEmbeddings(self.config)
        if self.config.position_embedding_type == "rotary":
            self.rotary_embeddings = MLXEsmRotaryEmbedding(self.config)
        self.encoder = MLXEsmEncoder(self.config)
        self.pooler = MLXEsmPooler(self.config) if add_pooling_layer else None
        self.contact_head = MLXEsmContactPredictionHead(self.config)

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MLXBaseModelOutputWithPooling | tuple:
        """
        Args:
            input_ids: [B, L] token ids, as `mx.array`, NumPy, lists or torch tensors (all arguments alike).
            attention_mask: [B, L], 1 for tokens, 0 for padding.
            position_ids: [B, L] or [1, L]; by default tokens are counted.
            inputs_embeds: [B, L, D] instead of `input_ids`; as in transformers 5 they enter the encoder as they are.
            output_attentions, output_hidden_states, return_dict: by default the config's.

        At padding the outputs are finite and otherwise unspecified. The pooler reads each row's first real token.

        Raises:
            ValueError: ids outside the vocabulary, rows longer than the position table, an empty batch, a mask of
                another shape. Checked where the values are at hand, not while the call is being traced.
        """
        outputs, layout = self.run_encoder(
            input_ids, attention_mask, position_ids, inputs_embeds, output_attentions, output_hidden_states
        )
        states, pooled = layout.unpack(outputs.last_hidden_state), None
        if self.pooler is not None:
            pooled = self.pooler(states, as_array(attention_mask)).astype(self.dtype)
        output = MLXBaseModelOutputWithPooling(
            last_hidden_state=states.astype(self.dtype),
            pooler_output=pooled,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if self.returns_dict(return_dict) else output.to_tuple()

    def run_encoder(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        labels: Any = None,
    ) -> tuple[Any, ops.Layout]:
        """The encoder's output, as a head goes on with it, and the layout of the batch.

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
        keep_padding = output_attentions or bool(self.training and config.attention_probs_dropout_prob)
        hidden_states, layout, position_embeddings = self.embed(
            input_ids, attention_mask, position_ids, inputs_embeds, keep_padding, labels
        )
        outputs = self.encoder(hidden_states, layout, position_embeddings, output_attentions, output_hidden_states)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(layout.unpack(x).astype(self.dtype) for x in outputs.hidden_states)
        if outputs.attentions is not None:
            outputs.attentions = tuple(x.astype(self.dtype) for x in outputs.attentions)
        return outputs, layout

    def embed(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        keep_padding: bool = False,
        labels: Any = None,
    ) -> tuple[mx.array, ops.Layout, tuple[mx.array, mx.array] | None]:
        """What the encoder takes: the embeddings in their layout, and the rotary angles of each token.

        Args:
            keep_padding: compute padding, too. So it is where some of it has a label.
        """
        inputs = check_inputs(input_ids, attention_mask, position_ids, inputs_embeds, self.tables())
        if inputs.input_ids is not None:
            hidden_states = self.embeddings(inputs.input_ids, inputs.attention_mask, inputs.position_ids)
        else:
            given: Any = inputs.inputs_embeds
            hidden_states = given.astype(ops.computing_dtype(self.dtype))
        if inputs.mask_values is not None:
            keep_padding = keep_padding or labels_at(labels, inputs.mask_values == 0)
        layout = ops.choose_layout(inputs.shape, inputs.attention_mask, inputs.mask_values, self.dtype, keep_padding)
        position_embeddings = None
        if self.config.position_embedding_type == "rotary":
            positions = mx.arange(inputs.shape[1]) if inputs.position_ids is None else inputs.position_ids
            position_embeddings = self.rotary_embeddings(layout.pack(mx.broadcast_to(positions, inputs.shape)))
        return layout.pack(hidden_states), layout, position_embeddings

    def tables(self) -> Tables:
        """The sizes that inputs have to fit."""
        config = self.config
        rows = config.max_position_embeddings if config.position_embedding_type == "absolute" else None
        return Tables(config.vocab_size, config.hidden_size, config.pad_token_id, rows)


class MLXEsmForMaskedLM(MLXEsmPreTrainedModel):
    """ESM with its language-model head.

    Example:
        >>> model = MLXEsmForMaskedLM.from_pretrained("facebook/esm2_t6_8M_UR50D")
        >>> inputs = tokenizer("MKT<mask>YIAKQR", return_tensors="mlx")
        >>> tokenizer.decode(model(**inputs).logits[0, 4].argmax().tolist())
    """

    output_embeddings = "lm_head.decoder"
    vocabulary_biases = ("lm_head.bias",)

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.esm = MLXEsmModel(self.config, add_pooling_layer=False)
        self.lm_head = MLXEsmLMHead(self.config)
        self.tie_weights()

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MLXMaskedLMOutput | tuple:
        """
        Args:
            labels: [B, L] token ids; −100 is left out of the loss, which is the mean cross-entropy.

        The other arguments are those of `MLXEsmModel`.

        Raises:
            ValueError: the checkpoint had no language-model head, and it is neither trained nor given labels.
        """
        if labels is None and not self.training:
            self.refuse_untrained("lm_head", "predicting residues")
        outputs, layout = self.esm.run_encoder(
            input_ids, attention_mask, position_ids, inputs_embeds, output_attentions, output_hidden_states, labels
        )
        logits = layout.unpack(self.lm_head(outputs.last_hidden_state)).astype(self.dtype)
        output = MLXMaskedLMOutput(
            loss=None if labels is None else cross_entropy(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if self.returns_dict(return_dict) else output.to_tuple()


class MLXEsmForSequenceClassification(MLXEsmPreTrainedModel):
    """ESM with a classifier or regressor over the whole sequence, on the state of its <cls> token."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = self.config.num_labels
        self.esm = MLXEsmModel(self.config, add_pooling_layer=False)
        self.classifier = MLXEsmClassificationHead(self.config)

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MLXSequenceClassifierOutput | tuple:
        """
        Args:
            labels: see `modeling_losses.classification_loss`.

        The other arguments are those of `MLXEsmModel`. A left-padded row is read at its first real token.
        """
        attention_mask = as_array(attention_mask)
        outputs, layout = self.esm.run_encoder(
            input_ids, attention_mask, position_ids, inputs_embeds, output_attentions, output_hidden_states
        )
        logits = self.classifier(layout.unpack(outputs.last_hidden_state), attention_mask).astype(self.dtype)
        output = MLXSequenceClassifierOutput(
            loss=None if labels is None else classification_loss(self.config, logits, as_array(labels)),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if self.returns_dict(return_dict) else output.to_tuple()


class MLXEsmForTokenClassification(MLXEsmPreTrainedModel):
    """ESM with a classifier over each token, such as for secondary structure."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = self.config.num_labels
        self.esm = MLXEsmModel(self.config, add_pooling_layer=False)
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob or 0)
        self.classifier = linear(self.config, self.config.hidden_size, self.num_labels)

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MLXTokenClassifierOutput | tuple:
        """
        Args:
            labels: [B, L] classes; −100 is left out of the loss, which is the mean cross-entropy.

        The other arguments are those of `MLXEsmModel`.
        """
        outputs, layout = self.esm.run_encoder(
            input_ids, attention_mask, position_ids, inputs_embeds, output_attentions, output_hidden_states, labels
        )
        logits = layout.unpack(self.classifier(self.dropout(outputs.last_hidden_state))).astype(self.dtype)
        output = MLXTokenClassifierOutput(
            loss=None if labels is None else cross_entropy(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if self.returns_dict(return_dict) else output.to_tuple()
