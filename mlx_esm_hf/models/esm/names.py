"""Key dialects of ESM checkpoints. Canonical names are those of transformers 5 in memory."""

from mlx_esm_hf.checkpoint.names import Dialect

# transformers 4.x and the published repositories: inverse frequencies in each layer, position ids, and sometimes a
# position table that a rotary model does not use. Our `save_pretrained` writes this dialect.
TRANSFORMERS_4 = Dialect(
    renames=(("encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq", "rotary_embeddings.inv_freq"),),
    ignored=("embeddings.position_ids", "embeddings.position_embeddings.weight"),
)

# Written by `save_pretrained` of transformers 5, with an asterisk for the layer of the inverse frequencies.
TRANSFORMERS_5 = Dialect(
    renames=(
        ("{module}LayerNorm.gamma", "{module}LayerNorm.weight"),
        ("{module}LayerNorm.beta", "{module}LayerNorm.bias"),
    )
)

# fair-esm 2.0 in memory: `ESM2`, and `ProteinBertModel` for ESM-1b and ESM-1v.
FAIR_ESM = Dialect(
    renames=(
        ("embed_tokens.weight", "embeddings.word_embeddings.weight"),
        ("embed_positions.weight", "embeddings.position_embeddings.weight"),
        ("emb_layer_norm_before.{rest}", "embeddings.layer_norm.{rest}"),
        ("layers.{layer}.self_attn.rot_emb.inv_freq", "rotary_embeddings.inv_freq"),
        ("layers.{layer}.self_attn.q_proj.{rest}", "encoder.layer.{layer}.attention.self.query.{rest}"),
        ("layers.{layer}.self_attn.k_proj.{rest}", "encoder.layer.{layer}.attention.self.key.{rest}"),
        ("layers.{layer}.self_attn.v_proj.{rest}", "encoder.layer.{layer}.attention.self.value.{rest}"),
        ("layers.{layer}.self_attn.bias_{rest}", "encoder.layer.{layer}.attention.self.bias_{rest}"),
        ("layers.{layer}.self_attn.out_proj.{rest}", "encoder.layer.{layer}.attention.output.dense.{rest}"),
        ("layers.{layer}.self_attn_layer_norm.{rest}", "encoder.layer.{layer}.attention.LayerNorm.{rest}"),
        ("layers.{layer}.fc1.{rest}", "encoder.layer.{layer}.intermediate.dense.{rest}"),
        ("layers.{layer}.fc2.{rest}", "encoder.layer.{layer}.output.dense.{rest}"),
        ("layers.{layer}.final_layer_norm.{rest}", "encoder.layer.{layer}.LayerNorm.{rest}"),
        ("emb_layer_norm_after.{rest}", "encoder.emb_layer_norm_after.{rest}"),
        ("lm_head.weight", "lm_head.decoder.weight"),
    ),
    prefixed=False,
)

# fair-esm's ESM-1, whose head has other names.
FAIR_ESM_1 = Dialect(
    renames=(
        ("embed_out", "lm_head.decoder.weight"),
        ("embed_out_bias", "lm_head.bias"),
        *FAIR_ESM.renames,
    ),
    ignored=("embed_positions._float_tensor",),
    prefixed=False,
)
