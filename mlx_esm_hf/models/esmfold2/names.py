"""Key dialects of ESMFold2 checkpoints. Canonical names are those of transformers, in memory and in files."""

from __future__ import annotations

import re
from collections.abc import Mapping

import mlx.core as mx

from mlx_esm_hf.checkpoint.names import Dialect
from mlx_esm_hf.errors import CheckpointError

TRANSFORMERS = Dialect(renames=())

TOKENS = "structure_head.diffusion_module.token_transformer"
CONDITIONING = "structure_head.diffusion_module.conditioning"
AVERAGING = "msa_encoder.blocks.{layer}.msa_pair_weighted_averaging"
OUR_AVERAGING = "msa_encoder.layers.{layer}.msa_pair_weighted_averaging"

# Biohub's own repositories: arrays that correspond one to one. `unpacked` splits and joins the others.
BIOHUB = Dialect(
    renames=(
        # the atom networks
        *(
            (f"{theirs}.atom_transformer.blocks.{{layer}}.{part}", f"{ours}.layers.{{layer}}.{name}")
            for theirs, ours in (
                ("inputs_embedder.atom_attention_encoder", "input_embedder.atom_encoder"),
                ("structure_head.diffusion_module.atom_encoder", "structure_head.atom_encoder"),
                ("structure_head.diffusion_module.atom_decoder", "structure_head.atom_decoder"),
            )
            for part, name in (
                ("adaln_modulation.1.weight", "adaln_linear.weight"),
                ("attn.out_proj.weight", "self_attn.o_proj.weight"),
                ("attn.{rest}", "self_attn.{rest}"),
                ("ffn.w_up.weight", "mlp.gate_up_proj.weight"),
                ("ffn.w_down.weight", "mlp.down_proj.weight"),
            )
        ),
        ("inputs_embedder.atom_attention_encoder.{rest}", "input_embedder.atom_encoder.{rest}"),
        # the denoiser
        ("structure_head.diffusion_module.atom_encoder.coords_linear.weight", "structure_head.coords_linear.weight"),
        (f"{CONDITIONING}.fourier.w", "structure_head.conditioning.fourier.frequencies"),
        (f"{CONDITIONING}.fourier.b", "structure_head.conditioning.fourier.phases"),
        *(
            (f"{CONDITIONING}.{theirs}", f"structure_head.conditioning.{ours}")
            for short, long in (("z", "pair"), ("s", "single"))
            for theirs, ours in (
                (f"{short}_transitions.{{layer}}.norm.{{rest}}", f"{long}_transition_{{layer}}.norm.{{rest}}"),
                (f"{short}_transitions.{{layer}}.out_proj.weight", f"{long}_transition_{{layer}}.mlp.down_proj.weight"),
                (
                    f"{short}_transitions.{{layer}}.gate_up_proj.weight",
                    f"{long}_transition_{{layer}}.mlp.gate_up_proj.weight",
                ),
                (f"{short}_input_norm.{{rest}}", f"{long}_input_norm.{{rest}}"),
                (f"{short}_proj.{{rest}}", f"{long}_proj.{{rest}}"),
            )
        ),
        *(
            (f"{TOKENS}.{theirs}", f"structure_head.token_transformer.layers.{{layer}}.{ours}")
            for theirs, ours in (
                *(
                    (f"{blocks}.{{layer}}.adaln.{part}", f"{norm}.{name}")
                    for blocks, norm in (
                        ("attn_blocks", "input_layernorm"),
                        ("transition_blocks", "post_attention_layernorm"),
                    )
                    for part, name in (
                        ("s_scale", "cond_norm.weight"),
                        ("s_gate.{rest}", "gate_proj.{rest}"),
                        ("s_shift.{rest}", "shift_proj.{rest}"),
                    )
                ),
                ("attn_blocks.{layer}.out_gate.{rest}", "attn_gate.{rest}"),
                ("attn_blocks.{layer}.pair_norm.{rest}", "pair_norm.{rest}"),
                ("attn_blocks.{layer}.pair_bias_proj.{rest}", "pair_bias_proj.{rest}"),
                ("attn_blocks.{layer}.g_proj.weight", "self_attn.gate_proj.weight"),
                ("attn_blocks.{layer}.out_proj.weight", "self_attn.o_proj.weight"),
                ("attn_blocks.{layer}.{rest}", "self_attn.{rest}"),
                ("transition_blocks.{layer}.output_gate.{rest}", "mlp_gate.{rest}"),
                ("transition_blocks.{layer}.lin_swish.weight", "mlp.gate_up_proj.weight"),
                ("transition_blocks.{layer}.lin_out.weight", "mlp.down_proj.weight"),
            )
        ),
        ("structure_head.diffusion_module.s_to_token.{rest}", "structure_head.single_to_token.{rest}"),
        ("structure_head.diffusion_module.s_step_norm.{rest}", "structure_head.single_step_norm.{rest}"),
        ("structure_head.diffusion_module.{rest}", "structure_head.{rest}"),
        # the input
        ("z_init_1.weight", "input_embedder.pair_init_1.weight"),
        ("z_init_2.weight", "input_embedder.pair_init_2.weight"),
        ("rel_pos.{rest}", "input_embedder.rel_pos.{rest}"),
        ("token_bonds.{rest}", "input_embedder.token_bonds.{rest}"),
        ("language_model.base_z_linear.0.{rest}", "language_model.pair_input_norm.{rest}"),
        ("language_model.base_z_linear.1.{rest}", "language_model.pair_proj.{rest}"),
        ("language_model.base_z_combine", "language_model.layer_weights"),
        ("language_model.base_z_mlp.0.output_mlp.0.{rest}", "language_model.single_to_pair.output_fc1.{rest}"),
        ("language_model.base_z_mlp.0.output_mlp.2.{rest}", "language_model.single_to_pair.output_fc2.{rest}"),
        ("language_model.base_z_mlp.0.{rest}", "language_model.single_to_pair.{rest}"),
        ("language_model.base_z_mlp.1.{rest}", "language_model.pair_output_norm.{rest}"),
        # the MSA encoder
        (f"{AVERAGING}.compute_bias.0.{{rest}}", f"{OUR_AVERAGING}.bias_norm.{{rest}}"),
        (f"{AVERAGING}.compute_bias.1.{{rest}}", f"{OUR_AVERAGING}.bias_proj.{{rest}}"),
        (f"{AVERAGING}.Wv.{{rest}}", f"{OUR_AVERAGING}.v_proj.{{rest}}"),
        (f"{AVERAGING}.Wgate.{{rest}}", f"{OUR_AVERAGING}.gate_proj.{{rest}}"),
        (f"{AVERAGING}.Wout.{{rest}}", f"{OUR_AVERAGING}.o_proj.{{rest}}"),
        (
            "msa_encoder.blocks.{layer}.outer_product_mean.W.{rest}",
            "msa_encoder.layers.{layer}.outer_product_mean.input_proj.{rest}",
        ),
        (
            "msa_encoder.blocks.{layer}.outer_product_mean.Wout.{rest}",
            "msa_encoder.layers.{layer}.outer_product_mean.output_proj.{rest}",
        ),
        ("msa_encoder.blocks.{layer}.{rest}", "msa_encoder.layers.{layer}.{rest}"),
        # the recurrence
        ("parcae_log_a", "parcae.log_state_decay"),
        ("parcae_log_delta", "parcae.log_delta"),
        ("parcae_b_cont", "parcae.input_matrix_continuous"),
        ("parcae_input_norm.{rest}", "parcae.input_norm.{rest}"),
        ("parcae_readout.weight", "parcae.out_proj.weight"),
        # the confidence head
        ("confidence_head.s_inputs_norm.{rest}", "confidence_head.input_embedder.single_inputs_norm.{rest}"),
        ("confidence_head.z_norm.{rest}", "confidence_head.input_embedder.pair_norm.{rest}"),
        ("confidence_head.s_to_z{rest}", "confidence_head.input_embedder.single_to_pair{rest}"),
        ("confidence_head.plddt_ln.{rest}", "confidence_head.plddt_layernorm.{rest}"),
        ("confidence_head.pae_ln.{rest}", "confidence_head.pae_layernorm.{rest}"),
        ("confidence_head.pde_ln.{rest}", "confidence_head.pde_layernorm.{rest}"),
        ("confidence_head.resolved_ln.{rest}", "confidence_head.resolved_layernorm.{rest}"),
    ),
    prefixed=False,
)

UNUSED = re.compile(r"confidence_head\.(s_norm|s_inputs_to_single|s_input_to_s)\..*")  # nothing reads these arrays

# Layers of pairs have the same names everywhere, with another name before them.
BLOCKS = re.compile(
    r"(.*)\bblocks\.(\d+)\.(tri_mul_out\._engine|tri_mul_in\._engine|pair_transition|msa_transition)\.(.*)"
)
PARTS = {"ffn.w12.weight": "mlp.gate_up_proj.weight", "ffn.w3.weight": "mlp.down_proj.weight"}

# {suffix of an array: the arrays that it stacks, from top to bottom}
PACKED = {
    ".attn.Wqkv.weight": (".attn.q_proj.weight", ".attn.k_proj.weight", ".attn.v_proj.weight"),
    ".kv_proj.weight": (".k_proj.weight", ".v_proj.weight"),
}
GATE, UP, GATE_UP = ".a_proj.weight", ".b_proj.weight", ".gate_up_proj.weight"

# Names of transformers' development before 5.16, which no release reads.
DEVELOPMENT = re.compile(r"inputs_atom_encoder\.|.*\.(attention_layers|transition_layers|pair_transitions)\.\d+\.")


def is_biohub(arrays: Mapping[str, mx.array]) -> bool:
    """Return whether a checkpoint has Biohub's names."""
    return "parcae_log_a" in arrays


def unpacked(arrays: Mapping[str, mx.array], source: str) -> dict[str, mx.array]:
    """Return the arrays of a checkpoint, with Biohub's packed ones split or joined; lazily, without a copy in memory.

    Args:
        arrays: {key: array} of a checkpoint in transformers' or Biohub's names.
        source: Hub id or folder, for messages.

    Raises:
        CheckpointError: the names are those of a development version, or half of a joined array is missing.
    """
    if found := next(filter(DEVELOPMENT.match, arrays), None):
        raise CheckpointError(
            f"{source} has names of a development version of transformers, such as {found!r}, which no release reads. "
            "Use a later revision of the repository."
        )
    if not is_biohub(arrays):
        return dict(arrays)
    result: dict[str, mx.array] = {}
    for key, array in arrays.items():
        suffix = next(filter(key.endswith, PACKED), None)
        if UNUSED.fullmatch(key) or key.endswith(UP):
            continue
        if suffix is not None:
            parts = PACKED[suffix]
            for name, part in zip(parts, mx.split(array, len(parts)), strict=True):
                result[key.removesuffix(suffix) + name] = part
        elif key.endswith(GATE):
            stem = key.removesuffix(GATE)
            if stem + UP not in arrays:
                raise CheckpointError(f"{source} has {key!r}, but lacks {stem + UP!r}. The checkpoint is incomplete.")
            result[stem + GATE_UP] = mx.concatenate([array, arrays[stem + UP]])
        elif match := BLOCKS.fullmatch(key):
            stack, layer, block, rest = match.groups()
            stack = "parcae.output_stack." if stack == "parcae_coda." else stack
            result[f"{stack}layers.{layer}.{block.removesuffix('._engine')}.{PARTS.get(rest, rest)}"] = array
        else:
            result[key] = array
    return result
