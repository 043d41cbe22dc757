"""Tiny configs for test models. This module imports neither torch nor transformers."""

from __future__ import annotations

from typing import Any

VOCABULARY = {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}  # ESM-1 has another by default
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
# Sizes that are not multiples of the kernels' vectors, and different numbers of heads.
ODD_SIZES = (
    {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 72},
    {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 160},
    {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96},
)
FAMILIES: dict[str, dict[str, Any]] = {
    "ESM-1b": {"position_embedding_type": "absolute", "emb_layer_norm_before": True, "layer_norm_eps": 1e-5},
    "ESM-1v": {"position_embedding_type": "absolute", "emb_layer_norm_before": False, "layer_norm_eps": 1e-12},
    "ESM-2": {"position_embedding_type": "rotary", "emb_layer_norm_before": False, "layer_norm_eps": 1e-5},
}


def as_loaded(model: Any) -> Any:
    """Return a new model as if a checkpoint had had all of its random weights, so that its contact head is used."""
    model.load_state_dict(model.state_dict())
    return model


def tiny(family: str = "ESM-2", **overrides: Any) -> dict[str, Any]:
    """Return the config fields for one of `FAMILIES`; for `MLXEsm1Config` use `SIZE` alone."""
    positions = {"max_position_embeddings": 40, "token_dropout": True}
    return {**VOCABULARY, **SIZE, **positions, **FAMILIES[family], **overrides}


def tiny_folding(**overrides: Any) -> dict[str, Any]:
    """Return the config fields of a folding model; `overrides` are fields of its `esmfold_config`.

    Most widths and numbers of heads differ, so that a swapped axis is an error.
    """
    structure = {
        "sequence_dim": 48,
        "pairwise_dim": 24,
        "ipa_dim": 8,
        "resnet_dim": 20,
        "num_heads_ipa": 3,
        "num_qk_points": 2,
        "num_v_points": 5,
        "num_blocks": 3,
        "num_transition_layers": 2,
        "num_resnet_blocks": 2,
    }
    trunk = {
        "num_blocks": 2,
        "sequence_state_dim": 64,
        "pairwise_state_dim": 32,
        "sequence_head_width": 32,
        "pairwise_head_width": 8,
        "position_bins": 6,
        "max_recycles": 3,
        "chunk_size": None,
        "structure_module": structure,
    }
    return {
        **VOCABULARY,
        "hidden_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 72,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        "token_dropout": True,
        "layer_norm_eps": 1e-5,
        "is_folding_model": True,
        "vocab_list": ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"],
        "esmfold_config": {"fp16_esm": False, "lddt_head_hid_dim": 12, "trunk": trunk, **overrides},
    }


def tiny_folding2(msa: bool = True, **overrides: Any) -> dict[str, Any]:
    """Return the config fields of ESMFold2, with an MSA encoder or without.

    Most widths and numbers of heads differ, and the window cuts the list of atoms.
    """
    atoms = {"num_hidden_layers": 2, "num_spatial_rope_pairs_per_axis": 1}
    fields = {
        "hidden_size": 32,
        "pairwise_hidden_size": 24,
        "single_inputs_size": 87,
        "pair_transition_intermediate_size": 40,
        "num_loops": 2,
        "chunk_size": 5,
        "sliding_window": 16,
        "num_relative_residx_bins": 6,
        "num_relative_chain_bins": 1,
        "esmc_config": {
            "model_type": "esmc",
            "hidden_size": 36,
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "intermediate_size": 44,
            "vocab_size": 64,
        },
        "folding_trunk_num_hidden_layers": 2,
        "parcae_num_coda_layers": 1,
        "atom_encoder": atoms
        | {
            "hidden_size": 28,
            "intermediate_size": 34,
            "output_dim": 20,
            "num_attention_heads": 2,
            "num_uid_rope_pairs": 3,
        },
        "structure_head": {
            "num_distogram_bins": 9,
            "num_diffusion_samples": 3,
            "inference_num_steps": 14,
            "noise_scale": 1.003,
            "step_scale": 1.5,
            "gamma_0": 0.8,
            "diffusion_module": {
                "hidden_size": 30,
                "intermediate_size": 42,
                "pair_intermediate_size": 26,
                "fourier_dim": 14,
                "num_hidden_layers": 2,
                "num_attention_heads": 5,
                "atom_encoder": atoms
                | {
                    "hidden_size": 32,
                    "intermediate_size": 38,
                    "output_dim": 30,
                    "num_attention_heads": 4,
                    "num_uid_rope_pairs": 1,
                },
            },
        },
        "confidence_head": {
            "num_plddt_bins": 7,
            "num_pde_bins": 6,
            "num_pae_bins": 8,
            "distogram_bins": 10,
            "num_hidden_layers": 1,
        },
        "msa_encoder": {
            "hidden_size": 18,
            "outer_hidden_size": 5,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "head_dim": 7,
            "intermediate_size": 22,
            "enabled": msa,
        },
        "lm_encoder": {"num_hidden_layers": 1},
    }
    return fields | overrides
