"""The ESM protein language models in MLX: ESM-1, ESM-1b, ESM-1v and ESM-2.

From top to bottom: embeddings, attention, layer, encoder, heads, and the four models. Modules and parameters have the
names of transformers' `models/esm/modeling_esm.py`, so the keys of a checkpoint are parameter names. The config
describes how the families differ.

Papers: Rives et al. 2019 (ESM-1, ESM-1b; PNAS 2021, doi:10.1073/pnas.2016239118), Rao et al. 2020 (contacts;
doi:10.1101/2020.12.15.422761), Meier et al. 2021 (ESM-1v; doi:10.1101/2021.07.09.450648), Lin et al. 2023 (ESM-2;
Science, doi:10.1126/science.ade2574).

In shapes, B is the batch, L the tokens, D the hidden size, H the heads and V the vocabulary. A packed batch holds the
T real tokens of all rows in one row, [1, T, D]; see `ops.Layout`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from transformers import PreTrainedConfig

from mlx_esm_hf import ops
from mlx_esm_hf.checkpoint.names import Dialect
from mlx_esm_hf.modeling_inputs import Tables, as_array, check_inputs, labels_at, refuse_arguments, to_numpy
from mlx_esm_hf.modeling_layers import (
    ClassificationHead,
    Dropout,
    Embedding,
    FrozenBuffers,
    LayerNorm,
    Module,
    dequantized_weight,
    each_layer,
    first_token,
    linear,
    rotary_angles,
    rotary_frequencies,
    run_layers,
    unpack_states,
)
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
from mlx_esm_hf.models.esm.tokenization_esm import RESIDUE_IDS
from mlx_esm_hf.runtime.memory import evaluate

# Share of residues replaced by <mask> in ESM's training: 15% were selected, 80% of those masked.
MASK_RATIO_TRAIN = 0.15 * 0.8

# Elements of attention maps that the contact head processes together (16 MB): many heads of a short protein, one head
# of a long protein.
MAPS_AT_A_TIME = 1 << 22


def embedding(config: MLXEsmConfig, size: int) -> Embedding:
    """Return an embedding table with transformers' initialization: normal, with zeros for the padding token."""
    table = Embedding(size, config.hidden_size)
    table.weight = mx.random.normal((size, config.hidden_size), scale=config.initializer_range)
    if config.pad_token_id is not None:
        table.weight[config.pad_token_id] = 0
    return table


def layer_norm(config: MLXEsmConfig) -> LayerNorm:
    """Return a layer norm over the hidden size."""
    return LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


# Positions


class MLXEsmRotaryEmbedding(FrozenBuffers):
    """Cosines and sines of the rotary position embedding (Su et al. 2021): [B, L] to two arrays [B, L, head_dim / 2].

    `inv_freq` is a buffer: it is loaded and saved, but never trained and never rounded to half precision. Its stored
    values are used, since a checkpoint may have been trained with rounded values.
    """

    frozen = ("inv_freq",)

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        self.inv_freq = rotary_frequencies(config.hidden_size // config.num_attention_heads, config.rope_theta)

    def __call__(self, position_ids: mx.array) -> tuple[mx.array, mx.array]:
        """Return the cosines and sines for positions [B, L]."""
        return rotary_angles(position_ids, self.inv_freq)


def sinusoidal_positions(position_ids: mx.array, hidden_size: int, padding_idx: int) -> mx.array:
    """Return ESM-1's position embeddings [B, L, D]: sines, then cosines, zero at padding.

    Source: fair-esm's `SinusoidalPositionalEmbedding`.
    """
    half = hidden_size // 2
    # Round the exponent to float32 before the exponential, as in training.
    exponents = np.arange(half, dtype=np.float32) * np.float32(-math.log(10000) / (half - 1))
    angles = position_ids[..., None].astype(mx.float32) * mx.array(np.exp(exponents.astype(np.float64)), mx.float32)
    positions = mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1)
    if hidden_size % 2:
        positions = mx.pad(positions, [(0, 0), (0, 0), (0, 1)])
    return mx.where((position_ids == padding_idx)[..., None], 0.0, positions)


def create_position_ids_from_input_ids(input_ids: mx.array, padding_idx: int) -> mx.array:
    """Return positions [B, L] that count the real tokens from padding_idx + 1; padding gets padding_idx."""
    real = (input_ids != padding_idx).astype(mx.int32)
    return mx.cumsum(real, axis=1) * real + padding_idx


# The network


class MLXEsmEmbeddings(Module):
    """Token ids [B, L] to vectors [B, L, D], zero at padding, in the dtype of the activations.

    The steps are word embeddings, token dropout, position embeddings (unless positions are rotary) and layer norm; the
    config says which of them a family has.
    """

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
        """Return the embeddings [B, L, D]."""
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
        """Set <mask> tokens to zero and scale the others to the share of unmasked tokens in training.

        A row with only <mask> tokens stays zero; transformers divides zero by zero there.
        """
        masked = input_ids == self.config.mask_token_id
        length = input_ids.shape[1] if attention_mask is None else attention_mask.sum(axis=-1)
        left = mx.maximum(length - masked.sum(axis=-1), 1)
        scale = (1 - MASK_RATIO_TRAIN) * length / left
        embeddings = mx.where(masked[..., None], 0, embeddings)
        return embeddings * scale[:, None, None].astype(embeddings.dtype)


class MLXEsmSelfAttention(Module):
    """Multi-head attention (Vaswani et al. 2017), [B, L, D], or packed [1, T, D], to the same shape.

    ESM-1 has one learned key and value, `bias_k` and `bias_v`, in addition to those of the tokens.
    """

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        D = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.query = linear(config, D, D)
        self.key = linear(config, D, D)
        self.value = linear(config, D, D)
        self.attention_dropout = config.attention_probs_dropout_prob or 0
        self.dropout = Dropout(self.attention_dropout)
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
        """Return the context [B, L, D], and the attention probabilities [B, H, L, L] or None.

        Args:
            hidden_states: [B, L, D].
            layout: which tokens attend to each other; None for all tokens of a row.
            position_embeddings: cosines and sines of the rotary angles, [B, L, head_dim / 2] each.
            output_attentions: return the probabilities.
        """
        query, key, value = self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)
        bias_kv = (self.bias_k, self.bias_v) if "bias_k" in self else None
        if not output_attentions and not (self.training and self.attention_dropout):
            # The same as below in one fused operation.
            context = ops.attention(query, key, value, self.num_attention_heads, layout, position_embeddings, bias_kv)
            return context, None

        heads = ops.split_heads(query, key, value, self.num_attention_heads, layout, position_embeddings, bias_kv)
        attentions = self.dropout(ops.attention_probabilities(heads.query, heads.key, heads.mask))
        context = ops.merge_heads(attentions @ heads.value)
        if "bias_k" in self:
            attentions = attentions[..., :-1]  # without the learned key
        return context, attentions if output_attentions else None


class MLXEsmOutput(Module):
    """Projection to the hidden size plus the residual, after attention and after the feed-forward."""

    def __init__(self, config: MLXEsmConfig, inputs: int):
        super().__init__()
        self.dense = linear(config, inputs, config.hidden_size)
        self.hidden_dropout = config.hidden_dropout_prob or 0
        self.dropout = Dropout(self.hidden_dropout)

    def __call__(self, hidden_states: mx.array, input_tensor: mx.array) -> mx.array:
        """Project hidden states [B, L, inputs] and add `input_tensor` [B, L, D]."""
        if self.training and self.hidden_dropout:
            return self.dropout(self.dense(hidden_states)) + input_tensor
        return self.dense(hidden_states, residual=input_tensor)


class MLXEsmAttention(Module):
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
        """Return the hidden states [B, L, D], and the attention probabilities [B, H, L, L] or None."""
        context, attentions = self.self(self.LayerNorm(hidden_states), layout, position_embeddings, output_attentions)
        return self.output(context, hidden_states), attentions


class MLXEsmIntermediate(Module):
    """First half of the feed-forward with GELU: [B, L, D] to [B, L, intermediate_size]."""

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        self.dense = linear(config, config.hidden_size, config.intermediate_size)

    def __call__(self, hidden_states: mx.array) -> mx.array:
        """Return the activations [B, L, intermediate_size]."""
        if self.training:  # the gradient needs GELU's input, which the fused operation does not keep
            return ops.gelu(self.dense(hidden_states))
        return self.dense(hidden_states, activation="gelu")


class MLXEsmLayer(Module):
    """A transformer layer, [B, L, D] to [B, L, D], with layer norms before attention and feed-forward."""

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
        """Return the hidden states [B, L, D], and the attention probabilities [B, H, L, L] or None."""
        hidden_states, attentions = self.attention(hidden_states, layout, position_embeddings, output_attentions)
        return self.output(self.intermediate(self.LayerNorm(hidden_states)), hidden_states), attentions


class MLXEsmEncoder(Module):
    """All layers and the final layer norm: [B, L, D], or packed [1, T, D], to the same shape."""

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        self.layer = [MLXEsmLayer(config) for _ in range(config.num_hidden_layers)]
        self.gradient_checkpointing = bool(getattr(config, "gradient_checkpointing", False))
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
        """Return the last hidden state, and all hidden states and attentions if requested."""
        hidden_states, layer_inputs, attentions = run_layers(
            self.layer,
            hidden_states,
            layout,
            position_embeddings,
            output_attentions,
            output_hidden_states,
            self.gradient_checkpointing and self.training,
        )
        if "emb_layer_norm_after" in self:
            hidden_states = self.emb_layer_norm_after(hidden_states)
        return MLXBaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=(*layer_inputs, hidden_states) if output_hidden_states else None,
            attentions=attentions,
        )


class MLXEsmPooler(Module):
    """Dense layer and tanh on the state of <cls>: [B, L, D] to [B, D]."""

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        self.dense = linear(config, config.hidden_size, config.hidden_size)

    def __call__(self, hidden_states: mx.array, attention_mask: mx.array | None = None) -> mx.array:
        """Return the pooled states [B, D]."""
        return mx.tanh(self.dense(first_token(hidden_states, attention_mask)))


def symmetrize(x: mx.array) -> mx.array:
    """Add to each map [..., L, L] its transpose."""
    return x + x.swapaxes(-1, -2)


def average_product_correct(x: mx.array) -> mx.array:
    """Subtract from each map [..., L, L] the product of its row and column sums over its total (Dunn et al. 2008)."""
    rows, columns = x.sum(axis=-1, keepdims=True), x.sum(axis=-2, keepdims=True)
    total = rows.sum(axis=-2, keepdims=True)  # of the row sums: adding L² elements sequentially loses precision
    return x - rows * columns / mx.where(total == 0, 1, total)


class MLXEsmContactPredictionHead(Module):
    """Logistic regression on all attention maps, symmetrized and corrected (Rao et al. 2020)."""

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        # transformers does not read the config here.
        self.eos_token_id = 2 if config.model_type == MLXEsmConfig.model_type else config.eos_token_id
        self.num_layers = config.num_hidden_layers
        self.regression = linear(config, config.num_hidden_layers * config.num_attention_heads, 1)

    def __call__(self, tokens: mx.array, attentions: Iterable[mx.array]) -> mx.array:
        """Return contact probabilities [B, residues, residues].

        Args:
            tokens: [B, L].
            attentions: [B, H, L, L] of each layer, zero at padding. Pass an iterator to hold one layer's maps in memory
                at a time.
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
            # Without this, MLX keeps the maps of many layers in memory, and several intermediates of each.
            evaluate(attention)
            for first in range(0, attention.shape[1], at_once):
                heads = slice(first, first + at_once)
                maps = mx.where(pairs, attention[:, heads, residues, residues], 0)
                logits = logits + (average_product_correct(symmetrize(maps)) * weight[heads]).sum(axis=1)
                evaluate(logits)
        return mx.sigmoid(logits)


def first_token_order(mask: mx.array) -> mx.array | None:
    """Return the order of columns [B, L] that rotates each row's first token to the front.

    Args:
        mask: bool [B, L], False at padding.

    Returns:
        The order, or None if no row is padded on the left.
    """
    first = mx.argmax(mask.astype(mx.int32), axis=1)
    values = to_numpy(first)
    if values is not None and not values.any():
        return None
    L = mask.shape[1]
    return (mx.arange(L) + first[:, None]) % L


def reorder(x: mx.array, order: mx.array | None, *axes: int) -> mx.array:
    """Reorder x [B, ...] along axes of length L by `order` [B, L]; None changes nothing."""
    if order is None:
        return x
    for axis in axes:
        shape = [1] * x.ndim
        shape[0], shape[axis] = order.shape
        x = mx.take_along_axis(x, order.reshape(shape), axis=axis)
    return x


class MLXEsmLMHead(Module):
    """Scores over the vocabulary, [..., D] to [..., V]: dense, GELU, layer norm (not in ESM-1) and projection."""

    def __init__(self, config: MLXEsmConfig):
        super().__init__()
        if config.lm_head_transform:
            self.dense = linear(config, config.hidden_size, config.hidden_size)
            self.layer_norm = layer_norm(config)
        self.decoder: Any = None  # set by the model if it is tied to the embeddings
        if not config.tie_word_embeddings:
            self.decoder = linear(config, config.hidden_size, config.vocab_size, bias=False)
        if config.lm_head_bias:
            self.bias = mx.zeros(config.vocab_size)

    def __call__(self, features: mx.array) -> mx.array:
        """Return the scores [..., V]."""
        if "dense" in self:
            features = self.layer_norm(ops.gelu(self.dense(features)))
        scores = self.decoder(features)
        return scores + self.bias if "bias" in self else scores


# The models


class MLXEsmPreTrainedModel(MLXPreTrainedModel):
    """Base of the family's models: describes their checkpoints."""

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
    residues = RESIDUE_IDS

    def __init__(self, config: PreTrainedConfig):
        super().__init__(self.checked_config(config))
        self.config: MLXEsmConfig

    @classmethod
    def checked_config(cls, config: PreTrainedConfig) -> MLXEsmConfig:
        """Return the config as an `MLXEsmConfig`, checked by `check_config`."""
        ours = as_mlx_config(config)
        check_config(ours, cls.folds)
        return ours

    @classmethod
    def max_tokens_of(cls, config: Any) -> int | None:
        """Return the longest row that the position table has room for; None for the families without such a table."""
        if config.position_embedding_type != "absolute":
            return None
        return config.max_position_embeddings - config.pad_token_id - 1


class MLXEsmModel(MLXEsmPreTrainedModel):
    """ESM without a head: hidden states, a pooled state, attentions and contacts.

    Args:
        config: an `MLXEsmConfig`, `MLXEsm1Config` or transformers' `EsmConfig`.
        add_pooling_layer: create a `pooler`.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from mlx_esm_hf import MLXEsmModel
        >>> tokenizer = AutoTokenizer.from_pretrained("facebook/esm2_t6_8M_UR50D")
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
        **ignored: Any,
    ) -> MLXBaseModelOutputWithPooling | tuple:
        """Run the model.

        Args:
            input_ids: [B, L] token ids. Like all arguments, an `mx.array`, NumPy array, list or torch tensor.
            attention_mask: [B, L], 1 for tokens, 0 for padding.
            position_ids: [B, L] or [1, L]; by default tokens are counted.
            inputs_embeds: [B, L, D] instead of `input_ids`. As in transformers 5, the encoder gets them unchanged.
            output_attentions: return attentions; default: the config's value.
            output_hidden_states: return all hidden states; default: the config's value.
            return_dict: return an output object instead of a tuple; default: the config's value.
            ignored: `use_cache`, `token_type_ids` and other arguments of transformers that have no effect here.

        Returns:
            The output, 0 at padding unless `compute_padding` is set. The pooler reads each row's first real token.

        Raises:
            ValueError: ids outside the vocabulary, rows longer than the position table, an empty batch, or a mask of
                the wrong shape. Values are not checked while the call is traced.
        """
        refuse_arguments(ignored)
        outputs, layout = self.run_encoder(
            input_ids, attention_mask, position_ids, inputs_embeds, output_attentions, output_hidden_states
        )
        states, pooled = layout.zero_padding(layout.unpack(outputs.last_hidden_state)), None
        if self.pooler is not None:
            pooled = self.pooler(states, as_array(attention_mask)).astype(self.dtype)
        output = MLXBaseModelOutputWithPooling(
            states.astype(self.dtype), pooled, outputs.hidden_states, outputs.attentions
        )
        return self.output_or_tuple(output, return_dict)

    def predict_contacts(self, tokens: Any, attention_mask: Any) -> mx.array:
        """Return contact probabilities of residue pairs.

        Args:
            tokens: [B, L] token ids.
            attention_mask: [B, L], 1 for tokens and 0 for padding, which may be on either side; None without padding.
                The map of a row does not depend on the side; transformers shifts the map of a left-padded row.

        Returns:
            [B, residues, residues], where residues is L without <cls> and, except in ESM-1, <eos>.

        Raises:
            ValueError: the checkpoint had no contact head.

        Source: Rao et al. 2020; transformers' `EsmModel.predict_contacts`.
        """
        self.refuse_untrained("contact_head", "contact prediction")
        tokens = as_array(tokens)
        hidden_states, layout, position_embeddings = self.embed(tokens, attention_mask, keep_padding=True)
        mask = mx.ones(tokens.shape, mx.bool_) if attention_mask is None else as_array(attention_mask).astype(mx.bool_)
        layers = each_layer(self.encoder.layer, hidden_states, layout, position_embeddings, output_attentions=True)
        real = mask[:, None, :, None] & mask[:, None, None, :]
        order = first_token_order(mask)
        attentions = (reorder(mx.where(real, attention, 0), order, 2, 3) for _, attention in layers)
        return self.contact_head(reorder(tokens, order, 1), attentions).astype(self.dtype)

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
        """Run embeddings and encoder, and return the encoder's output for a head, with the layout of the batch.

        Args:
            input_ids: [B, L]. This and the next five arguments are those of `__call__`.
            attention_mask: [B, L].
            position_ids: [B, L] or [1, L].
            inputs_embeds: [B, L, D].
            output_attentions: return attentions.
            output_hidden_states: return all hidden states.
            labels: [B, L]. If padding has labels, it is computed and takes part in the loss, as in transformers.

        Returns:
            An `MLXBaseModelOutput` and the layout. `last_hidden_state` may be packed: apply a head to it, then the
            layout's `unpack` to get [B, L, ...]. Its dtype is that of the activations. Hidden states and attentions are
            unpacked and have the model's dtype.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_padding = output_attentions or bool(self.training and config.attention_probs_dropout_prob)
        hidden_states, layout, position_embeddings = self.embed(
            input_ids, attention_mask, position_ids, inputs_embeds, keep_padding, labels
        )
        outputs = self.encoder(hidden_states, layout, position_embeddings, output_attentions, output_hidden_states)
        unpack_states(outputs, layout, self.dtype)
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
        """Return the encoder's inputs: embeddings in their layout, the layout, and each token's rotary angles or None.

        Args:
            input_ids: [B, L]. This and the next three arguments are those of `__call__`.
            attention_mask: [B, L].
            position_ids: [B, L] or [1, L].
            inputs_embeds: [B, L, D].
            keep_padding: compute padding as well.
            labels: [B, L]; padding with a label is computed as well.
        """
        inputs = check_inputs(input_ids, attention_mask, position_ids, inputs_embeds, self.tables())
        if inputs.input_ids is not None:
            hidden_states = self.embeddings(inputs.input_ids, inputs.attention_mask, inputs.position_ids)
        else:
            given: Any = inputs.inputs_embeds
            hidden_states = given.astype(ops.computing_dtype(self.dtype))
        if inputs.mask_values is not None:
            keep_padding = keep_padding or labels_at(labels, inputs.mask_values == 0)
        layout = ops.choose_layout(
            inputs.shape,
            inputs.attention_mask,
            inputs.mask_values,
            self.dtype,
            keep_padding,
            show_padding=self.compute_padding,
        )
        position_embeddings = None
        if self.config.position_embedding_type == "rotary":
            positions = mx.arange(inputs.shape[1]) if inputs.position_ids is None else inputs.position_ids
            position_embeddings = self.rotary_embeddings(layout.pack(mx.broadcast_to(positions, inputs.shape)))
        return layout.pack(hidden_states), layout, position_embeddings

    def tables(self) -> Tables:
        """Return the sizes that limit the inputs."""
        config = self.config
        rows = config.max_position_embeddings if config.position_embedding_type == "absolute" else None
        return Tables(config.vocab_size, config.hidden_size, config.pad_token_id, rows)


class MLXEsmForMaskedLM(MLXEsmPreTrainedModel):
    """ESM with its language-model head.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from mlx_esm_hf import MLXEsmForMaskedLM
        >>> tokenizer = AutoTokenizer.from_pretrained("facebook/esm2_t6_8M_UR50D")
        >>> model = MLXEsmForMaskedLM.from_pretrained("facebook/esm2_t6_8M_UR50D")
        >>> inputs = tokenizer("MKT<mask>YIAKQR", return_tensors="mlx")
        >>> residue = tokenizer.decode(model(**inputs).logits[0, 4].argmax().tolist())
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
        **ignored: Any,
    ) -> MLXMaskedLMOutput | tuple:
        """Run the model.

        Args:
            input_ids: [B, L]. This and the other arguments except `labels` are those of `MLXEsmModel`.
            attention_mask: [B, L].
            position_ids: [B, L] or [1, L].
            inputs_embeds: [B, L, D].
            labels: [B, L] token ids, −100 to exclude a token. The loss is the mean cross-entropy.
            output_attentions: return attentions.
            output_hidden_states: return all hidden states.
            return_dict: return an output object instead of a tuple.
            ignored: `use_cache`, `token_type_ids` and other arguments of transformers that have no effect here.

        Raises:
            ValueError: the checkpoint had no language-model head, the model is not in training mode, and there are no
                labels.
        """
        refuse_arguments(ignored)
        if labels is None and not self.training:
            self.refuse_untrained("lm_head", "predicting residues")
        outputs, layout = self.esm.run_encoder(
            input_ids, attention_mask, position_ids, inputs_embeds, output_attentions, output_hidden_states, labels
        )
        logits = layout.unpack(self.lm_head(outputs.last_hidden_state)).astype(self.dtype)
        loss = None if labels is None else cross_entropy(logits, labels)
        output = MLXMaskedLMOutput(loss, layout.zero_padding(logits), outputs.hidden_states, outputs.attentions)
        return self.output_or_tuple(output, return_dict)

    def predict_contacts(self, tokens: Any, attention_mask: Any) -> mx.array:
        """Return contact probabilities of residue pairs; see `MLXEsmModel.predict_contacts`."""
        return self.esm.predict_contacts(tokens, attention_mask)


class MLXEsmForSequenceClassification(MLXEsmPreTrainedModel):
    """ESM with a classifier or regressor for whole sequences, on the state of <cls>."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = self.config.num_labels
        self.esm = MLXEsmModel(self.config, add_pooling_layer=False)
        self.classifier = ClassificationHead(self.config, self.config.hidden_dropout_prob)

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
        **ignored: Any,
    ) -> MLXSequenceClassifierOutput | tuple:
        """Run the model. The head reads each row's first real token.

        Args:
            input_ids: [B, L]. This and the other arguments except `labels` are those of `MLXEsmModel`.
            attention_mask: [B, L].
            position_ids: [B, L] or [1, L].
            inputs_embeds: [B, L, D].
            labels: [B] or [B, num_labels]; see `modeling_losses.classification_loss`.
            output_attentions: return attentions.
            output_hidden_states: return all hidden states.
            return_dict: return an output object instead of a tuple.
            ignored: `use_cache`, `token_type_ids` and other arguments of transformers that have no effect here.
        """
        refuse_arguments(ignored)
        attention_mask = as_array(attention_mask)
        outputs, layout = self.esm.run_encoder(
            input_ids, attention_mask, position_ids, inputs_embeds, output_attentions, output_hidden_states
        )
        logits = self.classifier(layout.unpack(outputs.last_hidden_state), attention_mask).astype(self.dtype)
        loss = None if labels is None else classification_loss(self.config, logits, as_array(labels))
        output = MLXSequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return self.output_or_tuple(output, return_dict)


class MLXEsmForTokenClassification(MLXEsmPreTrainedModel):
    """ESM with a classifier for each token, for example of secondary structure."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = self.config.num_labels
        self.esm = MLXEsmModel(self.config, add_pooling_layer=False)
        self.dropout = Dropout(self.config.hidden_dropout_prob or 0)
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
        **ignored: Any,
    ) -> MLXTokenClassifierOutput | tuple:
        """Run the model.

        Args:
            input_ids: [B, L]. This and the other arguments except `labels` are those of `MLXEsmModel`.
            attention_mask: [B, L].
            position_ids: [B, L] or [1, L].
            inputs_embeds: [B, L, D].
            labels: [B, L] classes, −100 to exclude a token. The loss is the mean cross-entropy.
            output_attentions: return attentions.
            output_hidden_states: return all hidden states.
            return_dict: return an output object instead of a tuple.
            ignored: `use_cache`, `token_type_ids` and other arguments of transformers that have no effect here.
        """
        refuse_arguments(ignored)
        outputs, layout = self.esm.run_encoder(
            input_ids, attention_mask, position_ids, inputs_embeds, output_attentions, output_hidden_states, labels
        )
        logits = layout.unpack(self.classifier(self.dropout(outputs.last_hidden_state))).astype(self.dtype)
        loss = None if labels is None else cross_entropy(logits, labels)
        output = MLXTokenClassifierOutput(loss, layout.zero_padding(logits), outputs.hidden_states, outputs.attentions)
        return self.output_or_tuple(output, return_dict)
