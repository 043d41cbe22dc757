"""Key dialects of ESMC checkpoints. Canonical names are those of transformers 5, in memory and in files."""

from mlx_esm_hf.checkpoint.names import Dialect

TRANSFORMERS = Dialect(renames=(), ignored=("rotary_emb.inv_freq",))

# The published open weights for the `esm` package: arrays that correspond one to one. `SEPARATED` lists the others.
ORIGINAL = Dialect(
    renames=(
        ("embed.weight", "embed_tokens.weight"),
        ("transformer.blocks.{layer}.attn.layernorm_qkv.0.{rest}", "layers.{layer}.input_layernorm.{rest}"),
        ("transformer.blocks.{layer}.attn.q_ln.weight", "layers.{layer}.self_attn.q_norm.weight"),
        ("transformer.blocks.{layer}.attn.k_ln.weight", "layers.{layer}.self_attn.k_norm.weight"),
        ("transformer.blocks.{layer}.attn.out_proj.weight", "layers.{layer}.self_attn.o_proj.weight"),
        ("transformer.blocks.{layer}.ffn.0.{rest}", "layers.{layer}.post_attention_layernorm.{rest}"),
        ("transformer.blocks.{layer}.ffn.3.weight", "layers.{layer}.mlp.down_proj.weight"),
        ("transformer.norm.weight", "norm.weight"),
        ("sequence_head.0.{rest}", "lm_head.dense.{rest}"),
        ("sequence_head.2.{rest}", "lm_head.layer_norm.{rest}"),
        ("sequence_head.3.{rest}", "lm_head.decoder.{rest}"),
    ),
    prefixed=False,
)

# Matrices that stack several of ours: {suffix of the key: our matrices, from top to bottom}.
SEPARATED = {
    ".attn.layernorm_qkv.1.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ".ffn.1.weight": ("mlp.gate_proj", "mlp.up_proj"),
}
