"""ESMC (ESM Cambrian) in MLX, the protein language models that follow ESM-2.

From top to bottom: attention, feed-forward, layer, heads, and the four models. Modules and parameters have the names of
transformers' `models/esmc/modeling_esmc.py`, so the keys of a checkpoint are parameter names.

Differences from ESM-2: embeddings are not dropped or scaled, query and key are normalized, the feed-forward is SwiGLU,
layers have no biases, each branch is scaled before it is added to the residual, and a sequence may have several chains.

Source: EvolutionaryScale 2024, ESM Cambrian (https://evolutionaryscale.ai/blog/esm-cambrian); the published code. Query
and key norm: Dehghani et al. 2023 (arXiv:2302.05442). SwiGLU: Shazeer 2020 (arXiv:2002.05202).

In shapes, B is the batch, L the tokens, D the hidden size, H the heads and V the vocabulary. A packed batch holds the
T real tokens of all rows in one row, [1, T, D]; see `ops.Layout`.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
from transformers import PreTrainedConfig

from mlx_esm_hf import ops
from mlx_esm_hf.modeling_inputs import (
    Tables,
    as_array,
    check_inputs,
    check_sequence_id,
    labels_at,
    refuse_arguments,
    to_numpy,
)
from mlx_esm_hf.modeling_layers import (
    ClassificationHead,
    Dropout,
    Embedding,
    LayerNorm,
    Module,
    linear,
    rotary_angles,
    rotary_frequencies,
    run_layers,
    unpack_states,
)
from mlx_esm_hf.modeling_losses import classification_loss, cross_entropy
from mlx_esm_hf.modeling_outputs import (
    MLXBaseModelOutput,
    MLXMaskedLMOutput,
    MLXSequenceClassifierOutput,
    MLXTokenClassifierOutput,
)
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.models.esm.tokenization_esm import RESIDUE_IDS
from mlx_esm_hf.models.esmc.configuration_esmc import MLXEsmcConfig, as_mlx_config, check_config
from mlx_esm_hf.models.esmc.names import ORIGINAL, TRANSFORMERS

UNSCALED_DEPTH = 36  # number of layers at which branches are not scaled

# The network


class MLXEsmcAttention(Module):
    """Multi-head attention (Vaswani et al. 2017), [B, L, D], or packed [1, T, D], to the same shape.

    Query and key are normalized over their whole width, before they are split into heads and rotated.
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
        self.dropout = Dropout(self.attention_dropout)

    def __call__(
        self,
        hidden_states: mx.array,
        layout: ops.Layout | None = None,
        position_embeddings: tuple[mx.array, mx.array] | None = None,
        output_attentions: bool = False,
        residual: mx.array | None = None,
        output_scale: float = 1.0,
    ) -> tuple[mx.array, mx.array | None]:
        """Return the states [B, L, D], and the attention probabilities [B, H, L, L] or None.

        Args:
            hidden_states: [B, L, D].
            layout: which tokens attend to each other; None for all tokens of a row.
            position_embeddings: cosines and sines of the rotary angles, [B, L, head_dim / 2] each.
            output_attentions: return the probabilities.
            residual: [B, L, D], added to the scaled states.
            output_scale: factor of the states before the residual is added.
        """
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if not output_attentions and not (self.training and self.attention_dropout):
            # The same as below in one fused operation.
            norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
            context = ops.attention(
                query, key, value, self.num_attention_heads, layout, position_embeddings, norms=norms
            )
            return self.o_proj(context, residual=residual, output_scale=output_scale), None

        query, key = self.q_norm(query), self.k_norm(key)
        heads = ops.split_heads(query, key, value, self.num_attention_heads, layout, position_embeddings)
        attentions = self.dropout(ops.attention_probabilities(heads.query, heads.key, heads.mask))
        context = ops.merge_heads(attentions @ heads.value)
        output = self.o_proj(context, residual=residual, output_scale=output_scale)
        return output, attentions if output_attentions else None


class MLXEsmcMLP(Module):
    """SwiGLU feed-forward: down(silu(gate(x)) · up(x)) · output_scale + residual, [B, L, D] to [B, L, D]."""

    def __init__(self, config: MLXEsmcConfig):
        super().__init__()
        D, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = linear(config, D, width, bias)
        self.up_proj = linear(config, D, width, bias)
        self.down_proj = linear(config, width, D, bias)

    def __call__(
        self, hidden_states: mx.array, residual: mx.array | None = None, output_scale: float = 1.0
    ) -> mx.array:
        """Return the states [B, L, D], scaled and with the residual added."""
        gated = ops.swiglu(self.gate_proj(hidden_states), self.up_proj(hidden_states))
        return self.down_proj(gated, residual=residual, output_scale=output_scale)


class MLXEsmcLayer(Module):
    """A transformer layer, [B, L, D] to [B, L, D], with layer norms before attention and feed-forward.

    The output of each is divided by √(layers / 36) before it is added to the residual.
    """

    def __init__(self, config: MLXEsmcConfig):
        super().__init__()
        self.self_attn = MLXEsmcAttention(config)
        self.mlp = MLXEsmcMLP(config)
        self.input_layernorm = LayerNorm(config.hidden_size)
        self.post_attention_layernorm = LayerNorm(config.hidden_size)
        self.branch_scale = math.sqrt(UNSCALED_DEPTH / config.num_hidden_layers)

    def __call__(
        self,
        hidden_states: mx.array,
        layout: ops.Layout | None = None,
        position_embeddings: tuple[mx.array, mx.array] | None = None,
        output_attentions: bool = False,
    ) -> tuple[mx.array, mx.array | None]:
        """Return the hidden states [B, L, D], and the attention probabilities [B, H, L, L] or None."""
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


class MLXEsmcMaskedLMHead(Module):
    """Scores over the vocabulary, [..., D] to [..., V]: dense, GELU, layer norm, projection."""

    def __init__(self, config: MLXEsmcConfig):
        super().__init__()
        self.dense = linear(config, config.hidden_size, config.hidden_size)
        self.layer_norm = LayerNorm(config.hidden_size)
        self.decoder = linear(config, config.hidden_size, config.vocab_size)

    def __call__(self, hidden_states: mx.array) -> mx.array:
        """Return the scores [..., V]."""
        return self.decoder(self.layer_norm(ops.gelu(self.dense(hidden_states))))


# The models


class MLXEsmcPreTrainedModel(MLXPreTrainedModel):
    """Base of the family's models: describes their checkpoints."""

    config_class = MLXEsmcConfig
    base_model_prefix = "esmc"
    dialects = (TRANSFORMERS, ORIGINAL)
    required = ("embed_tokens.", "layers.", "norm.")
    quantized = ("layers.",)
    adapted = ("q_proj", "k_proj", "v_proj")
    input_embeddings = "embed_tokens"
    residues = RESIDUE_IDS

    def __init__(self, config: PreTrainedConfig):
        super().__init__(self.checked_config(config))
        self.config: MLXEsmcConfig

    @classmethod
    def checked_config(cls, config: PreTrainedConfig) -> MLXEsmcConfig:
        """Return the config as an `MLXEsmcConfig`, checked by `check_config`."""
        ours = as_mlx_config(config)
        check_config(ours)
        return ours


class MLXEsmcModel(MLXEsmcPreTrainedModel):
    """ESMC without a head: hidden states and attentions.

    Args:
        config: an `MLXEsmcConfig` or transformers' `EsmcConfig`.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from mlx_esm_hf import MLXEsmcModel
        >>> tokenizer = AutoTokenizer.from_pretrained("biohub/ESMC-300M")
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
        self.gradient_checkpointing = bool(getattr(config, "gradient_checkpointing", False))

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        sequence_id: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> MLXBaseModelOutput | tuple:
        """Run the model.

        Args:
            input_ids: [B, L] token ids. Like all arguments, an `mx.array`, NumPy array, list or torch tensor.
            attention_mask: [B, L], 1 for tokens, 0 for padding.
            position_ids: [B, L] or [1, L]; default: 0 to L − 1, counted across chains.
            sequence_id: [B, L], the chain of each token, −1 at padding. Tokens attend to tokens of their own chain
                only. Replaces `attention_mask`.
            output_attentions: return attentions; default: the config's value.
            output_hidden_states: return all hidden states; default: the config's value.
            return_dict: return an output object instead of a tuple; default: the config's value.
            ignored: `use_cache`, `token_type_ids` and other arguments of transformers that have no effect here.

        Returns:
            The output. At padding it is 0, unless `compute_padding` is set.

        Raises:
            ValueError: ids outside the vocabulary, an empty batch, or a mask or chains of the wrong shape. Values are
                not checked while the call is traced.
        """
        refuse_arguments(ignored)
        outputs, layout = self.run_encoder(
            input_ids, attention_mask, position_ids, sequence_id, output_attentions, output_hidden_states
        )
        outputs.last_hidden_state = layout.zero_padding(layout.unpack(outputs.last_hidden_state)).astype(self.dtype)
        return self.output_or_tuple(outputs, return_dict)

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
        """Run embeddings and layers, and return the output for a head, with the layout of the batch.

        Args:
            input_ids: [B, L]. This and the next five arguments are those of `__call__`.
            attention_mask: [B, L].
            position_ids: [B, L] or [1, L].
            sequence_id: [B, L].
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
        keep_padding = output_attentions or bool(self.training and config.attention_dropout)
        hidden_states, layout, position_embeddings = self.embed(
            input_ids, attention_mask, position_ids, sequence_id, keep_padding, labels
        )
        hidden_states, layer_inputs, attentions = run_layers(
            self.layers,
            hidden_states,
            layout,
            position_embeddings,
            output_attentions,
            output_hidden_states,
            self.gradient_checkpointing and self.training,
        )
        hidden_states = self.norm(hidden_states)
        outputs = MLXBaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=(*layer_inputs, hidden_states) if output_hidden_states else None,
            attentions=attentions,
        )
        unpack_states(outputs, layout, self.dtype)
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
        """Return the layers' inputs: embeddings in their layout, the layout, and the rotary angles of each token.

        Args:
            input_ids: [B, L]. This and the next three arguments are those of `__call__`.
            attention_mask: [B, L].
            position_ids: [B, L] or [1, L].
            sequence_id: [B, L].
            keep_padding: compute padding as well.
            labels: [B, L]; padding with a label is computed as well.
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
        layout = ops.choose_layout(inputs.shape, mask, values, self.dtype, keep_padding, chains, self.compute_padding)
        positions = mx.arange(inputs.shape[1]) if inputs.position_ids is None else inputs.position_ids
        frequencies = rotary_frequencies(config.head_dim, config.rope_parameters["rope_theta"])
        position_embeddings = rotary_angles(layout.pack(mx.broadcast_to(positions, inputs.shape)), frequencies)
        return layout.pack(hidden_states), layout, position_embeddings


class MLXEsmcForMaskedLM(MLXEsmcPreTrainedModel):
    """ESMC with its language-model head.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from mlx_esm_hf import MLXEsmcForMaskedLM
        >>> tokenizer = AutoTokenizer.from_pretrained("biohub/ESMC-300M")
        >>> model = MLXEsmcForMaskedLM.from_pretrained("biohub/ESMC-300M")
        >>> inputs = tokenizer("MKT<mask>YIAKQR", return_tensors="mlx")
        >>> residue = tokenizer.decode(model(**inputs).logits[0, 4].argmax().tolist())
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
        **ignored: Any,
    ) -> MLXMaskedLMOutput | tuple:
        """Run the model.

        Args:
            input_ids: [B, L]. This and the other arguments except `labels` are those of `MLXEsmcModel`.
            attention_mask: [B, L].
            position_ids: [B, L] or [1, L].
            sequence_id: [B, L].
            labels: [B, L] token ids, −100 to exclude a token. The loss is the mean cross-entropy, in float32.
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
        outputs, layout = self.esmc.run_encoder(
            input_ids, attention_mask, position_ids, sequence_id, output_attentions, output_hidden_states, labels
        )
        logits = layout.unpack(self.lm_head(outputs.last_hidden_state)).astype(self.dtype)
        loss = None if labels is None else cross_entropy(logits.astype(mx.float32), labels)
        output = MLXMaskedLMOutput(loss, layout.zero_padding(logits), outputs.hidden_states, outputs.attentions)
        return self.output_or_tuple(output, return_dict)


class MLXEsmcForSequenceClassification(MLXEsmcPreTrainedModel):
    """ESMC with a classifier or regressor for whole sequences, on the state of <cls>."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = self.config.num_labels
        self.esmc = MLXEsmcModel(self.config)
        self.classifier = ClassificationHead(self.config, self.config.classifier_dropout)

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
        **ignored: Any,
    ) -> MLXSequenceClassifierOutput | tuple:
        """Run the model. The head reads each row's first real token.

        Args:
            input_ids: [B, L]. This and the other arguments except `labels` are those of `MLXEsmcModel`.
            attention_mask: [B, L].
            position_ids: [B, L] or [1, L].
            sequence_id: [B, L].
            labels: [B] or [B, num_labels]; see `modeling_losses.classification_loss`.
            output_attentions: return attentions.
            output_hidden_states: return all hidden states.
            return_dict: return an output object instead of a tuple.
            ignored: `use_cache`, `token_type_ids` and other arguments of transformers that have no effect here.
        """
        refuse_arguments(ignored)
        outputs, layout = self.esmc.run_encoder(
            input_ids, attention_mask, position_ids, sequence_id, output_attentions, output_hidden_states
        )
        real = as_array(attention_mask) if sequence_id is None else as_array(sequence_id) >= 0
        logits = self.classifier(layout.unpack(outputs.last_hidden_state), real).astype(self.dtype)
        loss = None if labels is None else classification_loss(self.config, logits, as_array(labels))
        output = MLXSequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return self.output_or_tuple(output, return_dict)


class MLXEsmcForTokenClassification(MLXEsmcPreTrainedModel):
    """ESMC with a classifier for each token, for example of secondary structure."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = self.config.num_labels
        self.esmc = MLXEsmcModel(self.config)
        self.dropout = Dropout(0.1 if self.config.classifier_dropout is None else self.config.classifier_dropout)
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
        **ignored: Any,
    ) -> MLXTokenClassifierOutput | tuple:
        """Run the model.

        Args:
            input_ids: [B, L]. This and the other arguments except `labels` are those of `MLXEsmcModel`.
            attention_mask: [B, L].
            position_ids: [B, L] or [1, L].
            sequence_id: [B, L].
            labels: [B, L] classes, −100 to exclude a token. The loss is the mean cross-entropy, in float32.
            output_attentions: return attentions.
            output_hidden_states: return all hidden states.
            return_dict: return an output object instead of a tuple.
            ignored: `use_cache`, `token_type_ids` and other arguments of transformers that have no effect here.
        """
        refuse_arguments(ignored)
        outputs, layout = self.esmc.run_encoder(
            input_ids, attention_mask, position_ids, sequence_id, output_attentions, output_hidden_states, labels
        )
        logits = layout.unpack(self.score(self.dropout(outputs.last_hidden_state))).astype(self.dtype)
        loss = None if labels is None else cross_entropy(logits.astype(mx.float32), labels)
        output = MLXTokenClassifierOutput(loss, layout.zero_padding(logits), outputs.hidden_states, outputs.attentions)
        return self.output_or_tuple(output, return_dict)
