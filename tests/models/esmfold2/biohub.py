"""A checkpoint of ESMFold2 under Biohub's names, written independently of the names in the package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Rewrites of transformers' names, in order. Several of them depend on what earlier ones left.
RULES = [
    (r"^input_embedder\.atom_encoder\.", "inputs_embedder.atom_attention_encoder."),
    (r"^input_embedder\.pair_init_", "z_init_"),
    (r"^input_embedder\.", ""),
    (r"^structure_head\.coords_linear\.", "structure_head.diffusion_module.atom_encoder.coords_linear."),
    (r"^structure_head\.(?!diffusion_module\.)", "structure_head.diffusion_module."),
    (r"^(structure_head\.diffusion_module\.)single_", r"\1s_"),
    (r"\.conditioning\.pair_transition_(\d)\.", r".conditioning.z_transitions.\1."),
    (r"\.conditioning\.single_transition_(\d)\.", r".conditioning.s_transitions.\1."),
    (r"\.conditioning\.pair_", ".conditioning.z_"),
    (r"\.conditioning\.single_", ".conditioning.s_"),
    (r"(_transitions\.\d)\.mlp\.down_proj", r"\1.out_proj"),
    (r"\.fourier\.frequencies$", ".fourier.w"),
    (r"\.fourier\.phases$", ".fourier.b"),
    (r"(atom_(?:attention_)?(?:encoder|decoder))\.layers\.", r"\1.atom_transformer.blocks."),
    (r"(atom_transformer\.blocks\.\d+)\.self_attn\.", r"\1.attn."),
    (r"(atom_transformer\.blocks\.\d+)\.mlp\.gate_up_proj", r"\1.ffn.w_up"),
    (r"(atom_transformer\.blocks\.\d+)\.mlp\.down_proj", r"\1.ffn.w_down"),
    (r"(atom_transformer\.blocks\.\d+)\.adaln_linear", r"\1.adaln_modulation.1"),
    (r"token_transformer\.layers\.(\d+)\.input_layernorm\.", r"token_transformer.attn_blocks.\1.adaln.s_"),
    (
        r"token_transformer\.layers\.(\d+)\.post_attention_layernorm\.",
        r"token_transformer.transition_blocks.\1.adaln.s_",
    ),
    (r"token_transformer\.layers\.(\d+)\.attn_gate\.", r"token_transformer.attn_blocks.\1.out_gate."),
    (r"token_transformer\.layers\.(\d+)\.mlp_gate\.", r"token_transformer.transition_blocks.\1.output_gate."),
    (r"token_transformer\.layers\.(\d+)\.mlp\.gate_up_proj", r"token_transformer.transition_blocks.\1.lin_swish"),
    (r"token_transformer\.layers\.(\d+)\.mlp\.down_proj", r"token_transformer.transition_blocks.\1.lin_out"),
    (r"token_transformer\.layers\.(\d+)\.(pair_norm|pair_bias_proj)\.", r"token_transformer.attn_blocks.\1.\2."),
    (r"token_transformer\.layers\.(\d+)\.self_attn\.", r"token_transformer.attn_blocks.\1."),
    (r"\.adaln\.s_cond_norm\.weight$", ".adaln.s_scale"),
    (r"(\.adaln\.s_(?:gate|shift))_proj", r"\1"),
    (r"(attn_blocks\.\d+\.)gate_proj", r"\1g_proj"),
    (r"^parcae\.output_stack\.layers\.", "parcae_coda.blocks."),
    (r"^parcae\.out_proj", "parcae_readout"),
    (r"^parcae\.input_matrix_continuous", "parcae_b_cont"),
    (r"^parcae\.log_state_decay", "parcae_log_a"),
    (r"^parcae\.", "parcae_"),
    (r"\.layers\.(\d+)\.", r".blocks.\1."),
    (r"\.(tri_mul_(?:in|out))\.", r".\1._engine."),
    (r"(pair|msa)_transition\.mlp\.gate_up_proj", r"\1_transition.ffn.w12"),
    (r"(pair|msa)_transition\.mlp\.down_proj", r"\1_transition.ffn.w3"),
    (r"weighted_averaging\.bias_norm\.", "weighted_averaging.compute_bias.0."),
    (r"weighted_averaging\.bias_proj\.", "weighted_averaging.compute_bias.1."),
    (r"weighted_averaging\.(gate|v)_proj\.", r"weighted_averaging.W\1."),
    (r"weighted_averaging\.o_proj\.", "weighted_averaging.Wout."),
    (r"outer_product_mean\.input_proj\.", "outer_product_mean.W."),
    (r"outer_product_mean\.output_proj\.", "outer_product_mean.Wout."),
    (r"^confidence_head\.input_embedder\.single_inputs_norm", "confidence_head.s_inputs_norm"),
    (r"^confidence_head\.input_embedder\.single_to_pair", "confidence_head.s_to_z"),
    (r"^confidence_head\.input_embedder\.pair_norm", "confidence_head.z_norm"),
    (r"^confidence_head\.(plddt|pae|pde|resolved)_layernorm\.", r"confidence_head.\1_ln."),
    (r"^language_model\.pair_input_norm", "language_model.base_z_linear.0"),
    (r"^language_model\.pair_proj", "language_model.base_z_linear.1"),
    (r"^language_model\.pair_output_norm", "language_model.base_z_mlp.1"),
    (r"^language_model\.single_to_pair\.output_fc1", "language_model.base_z_mlp.0.output_mlp.0"),
    (r"^language_model\.single_to_pair\.output_fc2", "language_model.base_z_mlp.0.output_mlp.2"),
    (r"^language_model\.single_to_pair\.", "language_model.base_z_mlp.0."),
    (r"^language_model\.layer_weights$", "language_model.base_z_combine"),
    (r"(attn|attn_blocks\.\d+)\.o_proj\.weight$", r"\1.out_proj.weight"),
]
UNUSED = ("s_norm.weight", "s_norm.bias", "s_inputs_to_single.weight", "s_input_to_s.weight")


def renamed(name: str) -> str:
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name


def as_biohub(state: Mapping[str, Any], join: Any, halve: Any) -> dict[str, Any]:
    """Return a state dict in transformers' names, without ESMC, in Biohub's names.

    Args:
        state: {name: array}.
        join: concatenates arrays along the first axis.
        halve: splits an array into two along the first axis.
    """
    found: dict[str, Any] = {}
    for name, array in state.items():
        if name.startswith("esmc."):
            continue
        key = renamed(name)
        if re.search(r"\.attn\.[qkv]_proj", key):
            found.setdefault(re.sub(r"\.[qkv]_proj", ".Wqkv", key), []).append((key, array))
        elif re.search(r"attn_blocks\.\d+\.[kv]_proj", key):
            found.setdefault(re.sub(r"\.[kv]_proj", ".kv_proj", key), []).append((key, array))
        elif re.search(r"_transitions\.\d\.mlp\.gate_up_proj", key):
            gate, up = halve(array)
            found[key.replace("mlp.gate_up_proj", "a_proj")] = gate
            found[key.replace("mlp.gate_up_proj", "b_proj")] = up
        else:
            found[key] = array
    order = {"q": 0, "k": 1, "v": 2}
    for key, parts in found.items():
        if isinstance(parts, list):
            parts.sort(key=lambda part: order[re.findall(r"\.([qkv])_proj", part[0])[0]])
            found[key] = join([array for _, array in parts])
    spare = found["confidence_head.plddt_ln.weight"]
    return found | {f"confidence_head.{name}": spare for name in UNUSED}


def config_of_biohub(config: dict[str, Any], esmc_id: str) -> dict[str, Any]:
    """Return a config in Biohub's names, from the fields of one in transformers'."""
    head, module = config["structure_head"], config["structure_head"]["diffusion_module"]
    atoms, msa = config["atom_encoder"], config["msa_encoder"]
    assert module["intermediate_size"] % module["hidden_size"] == 0, "Biohub's configs have factors"
    return {
        "model_type": "esmfold2",
        "architectures": ["EsmFold2Model"],
        "type": "release",
        "esmc_id": esmc_id,
        "d_single": config["hidden_size"],
        "d_pair": config["pairwise_hidden_size"],
        "num_loops": config["num_loops"],
        "num_diffusion_samples": head["num_diffusion_samples"],
        "n_relative_residx_bins": config["num_relative_residx_bins"],
        "n_relative_chain_bins": config["num_relative_chain_bins"],
        "lm_d_model": config["esmc_config"]["hidden_size"],
        "lm_num_layers": config["esmc_config"]["num_hidden_layers"],
        "inputs": {
            "d_inputs": config["single_inputs_size"],
            "atom_encoder": {
                "d_atom": atoms["hidden_size"],
                "d_token": atoms["output_dim"] // 2,
                "n_blocks": atoms["num_hidden_layers"],
                "n_heads": atoms["num_attention_heads"],
                "expansion_ratio": atoms["intermediate_size"] / atoms["hidden_size"],
                "swa_window_size": config["sliding_window"],
                "n_spatial_rope_pairs_per_axis": atoms["num_spatial_rope_pairs_per_axis"],
                "n_uid_rope_pairs": atoms["num_uid_rope_pairs"],
            },
        },
        "folding_trunk": {"n_layers": config["folding_trunk_num_hidden_layers"], "n_heads": 4, "dropout": 0.25},
        "parcae": {"enabled": True, "coda_n_layers": config["parcae_num_coda_layers"], "max_steps": 12},
        "lm_encoder": {"enabled": True, "n_layers": config["lm_encoder"]["num_hidden_layers"], "lm_dropout": 0.25},
        "msa_encoder": {
            "enabled": msa["enabled"],
            "d_msa": msa["hidden_size"],
            "d_hidden": msa["outer_hidden_size"],
            "n_layers": msa["num_hidden_layers"],
            "n_heads_msa": msa["num_attention_heads"],
            "msa_head_width": msa["head_dim"],
        },
        "structure_head": {
            "distogram_bins": head["num_distogram_bins"],
            "inference_num_steps": head["inference_num_steps"],
            "inference_s_max": 160.0,
            "inference_s_min": 4e-4,
            "inference_p": 8.0,
            "noise_scale": head["noise_scale"],
            "step_scale": head["step_scale"],
            "gamma_0": head["gamma_0"],
            "diffusion_module": {
                "sigma_data": 16.0,
                "c_token": module["hidden_size"],
                "c_atom": module["atom_encoder"]["hidden_size"],
                "c_z": config["pairwise_hidden_size"],
                "fourier_dim": module["fourier_dim"],
                "atom_num_blocks": module["atom_encoder"]["num_hidden_layers"],
                "atom_num_heads": module["atom_encoder"]["num_attention_heads"],
                "token_num_blocks": module["num_hidden_layers"],
                "token_num_heads": module["num_attention_heads"],
                "transition_multiplier": module["intermediate_size"] // module["hidden_size"],
            },
        },
        "confidence_head": {
            "enabled": True,
            "folding_trunk": {"n_layers": config["confidence_head"]["num_hidden_layers"], "n_heads": 4},
            "num_plddt_bins": config["confidence_head"]["num_plddt_bins"],
            "num_pde_bins": config["confidence_head"]["num_pde_bins"],
            "num_pae_bins": config["confidence_head"]["num_pae_bins"],
            "distogram_bins": config["confidence_head"]["distogram_bins"],
        },
    }
