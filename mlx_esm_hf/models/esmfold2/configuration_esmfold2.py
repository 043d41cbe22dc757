"""Configuration of ESMFold2, in transformers' names and in those of Biohub's repositories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import EsmFold2Config, PreTrainedConfig

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.models.esmc.configuration_esmc import as_mlx_config as as_esmc_config
from mlx_esm_hf.models.esmc.configuration_esmc import check_config as check_esmc_config
from mlx_esm_hf.models.others import model_type_of

ESMC, ESMC_HEAD = "biohub/ESMC-6B", 64  # the language model of the published models, and the width of its heads

# {path of our field: path of the field in Biohub's configs}
BIOHUB = {
    "hidden_size": "d_single",
    "pairwise_hidden_size": "d_pair",
    "single_inputs_size": "inputs.d_inputs",
    "sliding_window": "inputs.atom_encoder.swa_window_size",
    "folding_trunk_num_hidden_layers": "folding_trunk.n_layers",
    "parcae_num_coda_layers": "parcae.coda_n_layers",
    "num_relative_residx_bins": "n_relative_residx_bins",
    "num_relative_chain_bins": "n_relative_chain_bins",
    "atom_encoder.hidden_size": "inputs.atom_encoder.d_atom",
    "atom_encoder.num_hidden_layers": "inputs.atom_encoder.n_blocks",
    "atom_encoder.num_attention_heads": "inputs.atom_encoder.n_heads",
    "atom_encoder.spatial_rope_base_frequency": "inputs.atom_encoder.spatial_rope_base_frequency",
    "atom_encoder.num_spatial_rope_pairs_per_axis": "inputs.atom_encoder.n_spatial_rope_pairs_per_axis",
    "atom_encoder.num_uid_rope_pairs": "inputs.atom_encoder.n_uid_rope_pairs",
    "atom_encoder.uid_rope_base_frequency": "inputs.atom_encoder.uid_rope_base_frequency",
    "structure_head.num_diffusion_samples": "num_diffusion_samples",
    "structure_head.num_distogram_bins": "structure_head.distogram_bins",
    "structure_head.inference_sigma_max_ratio": "structure_head.inference_s_max",
    "structure_head.inference_sigma_min_ratio": "structure_head.inference_s_min",
    "structure_head.inference_exponent": "structure_head.inference_p",
    "structure_head.diffusion_module.hidden_size": "structure_head.diffusion_module.c_token",
    "structure_head.diffusion_module.num_hidden_layers": "structure_head.diffusion_module.token_num_blocks",
    "structure_head.diffusion_module.num_attention_heads": "structure_head.diffusion_module.token_num_heads",
    **{
        f"structure_head.diffusion_module.atom_encoder.{ours}": f"structure_head.diffusion_module.{theirs}"
        for ours, theirs in (
            ("hidden_size", "c_atom"),
            ("num_hidden_layers", "atom_num_blocks"),
            ("num_attention_heads", "atom_num_heads"),
        )
    },
    "confidence_head.num_hidden_layers": "confidence_head.folding_trunk.n_layers",
    "msa_encoder.hidden_size": "msa_encoder.d_msa",
    "msa_encoder.outer_hidden_size": "msa_encoder.d_hidden",
    "msa_encoder.num_hidden_layers": "msa_encoder.n_layers",
    "msa_encoder.num_attention_heads": "msa_encoder.n_heads_msa",
    "msa_encoder.head_dim": "msa_encoder.msa_head_width",
    "lm_encoder.num_hidden_layers": "lm_encoder.n_layers",
    "esmc_config.hidden_size": "lm_d_model",
    "esmc_config.num_hidden_layers": "lm_num_layers",
}

# {path of a width: (path of the width it is a multiple of, path of the factor in Biohub's configs, its default)}
MULTIPLES = {
    "pair_transition_intermediate_size": ("pairwise_hidden_size", "", 4),
    "atom_encoder.intermediate_size": ("atom_encoder.hidden_size", "inputs.atom_encoder.expansion_ratio", 2),
    "structure_head.diffusion_module.intermediate_size": (
        "structure_head.diffusion_module.hidden_size",
        "structure_head.diffusion_module.transition_multiplier",
        2,
    ),
    "structure_head.diffusion_module.pair_intermediate_size": (
        "pairwise_hidden_size",
        "structure_head.diffusion_module.transition_multiplier",
        2,
    ),
    "structure_head.diffusion_module.atom_encoder.intermediate_size": (
        "structure_head.diffusion_module.atom_encoder.hidden_size",
        "",
        2,
    ),
    "msa_encoder.intermediate_size": ("msa_encoder.hidden_size", "", 4),
}

# Fields that only Biohub's configs have.
MARKERS = ("d_single", "d_pair", "inputs")
OTHERS = (*MARKERS, "type", "folding_trunk", "parcae", "lm_d_model", "lm_num_layers", "num_diffusion_samples")


class MLXEsmFold2Config(EsmFold2Config):
    """transformers' `EsmFold2Config` for the MLX model, which accepts a plain `EsmFold2Config` as well.

    The defaults are not the published models: their configs have other numbers of loops, samples, steps and bins.
    `esmc_id` names the repository of the language model if the checkpoint does not hold it.

    Raises:
        ValueError: in `from_dict` and `from_pretrained`, for a `model_type` other than "esmfold2", and for Biohub's
            experimental models.

    Example:
        >>> from mlx_esm_hf import MLXEsmFold2Config
        >>> config = MLXEsmFold2Config.from_pretrained("biohub/ESMFold2-Fast")
    """

    if TYPE_CHECKING:  # optional in transformers, but always set here
        hidden_size: int
        pairwise_hidden_size: int
        esmc_config: Any
        atom_encoder: Any
        structure_head: Any
        sliding_window: int
        num_loops: int
        confidence_head: Any
        msa_encoder: Any
        lm_encoder: Any
        esmc_id: str

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config that `config_dict` describes; `kwargs` as in `PreTrainedConfig.from_dict`."""
        source = config_dict.get("_name_or_path", "")
        model_type = model_type_of(config_dict, source, cls.model_type)
        if model_type != cls.model_type:
            raise UserError(
                f"{cls.__name__} expected model_type {cls.model_type!r}, got {model_type!r}. Load the config with the "
                "class it belongs to, or with an Auto class."
            )
        if str(config_dict.get("type", "")).startswith("experimental"):
            raise UserError(
                f"{source or 'This model'} is an experimental ESMFold2, whose network is another one. Use the released "
                "biohub/ESMFold2 or biohub/ESMFold2-Fast."
            )
        if any(name in config_dict for name in MARKERS):
            config_dict = from_biohub(config_dict)
        return super().from_dict(config_dict, **kwargs)


def at_path(fields: Mapping[str, Any], path: str) -> Any:
    """Return the value at a path such as "structure_head.gamma_0"; None if it is missing."""
    value: Any = fields
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def set_at_path(fields: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a path, and create the dictionaries on the way."""
    *parents, last = path.split(".")
    for name in parents:
        fields[name] = dict(fields.get(name) or {})
        fields = fields[name]
    fields[last] = value


def from_biohub(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config in transformers' names, given one in Biohub's or in both; transformers' fields have priority."""
    config = dict(fields)
    for ours, theirs in BIOHUB.items():
        if at_path(config, ours) is None and (value := at_path(fields, theirs)) is not None:
            set_at_path(config, ours, value)
    for ours, (base, factor, default) in MULTIPLES.items():
        width = at_path(config, base)
        if at_path(config, ours) is None and width is not None:
            set_at_path(config, ours, int(width * (factor and at_path(fields, factor) or default)))
    for ours, width in (
        ("atom_encoder.output_dim", "single_inputs_size"),
        ("structure_head.diffusion_module.atom_encoder.output_dim", "structure_head.diffusion_module.hidden_size"),
    ):
        if at_path(config, ours) is None and at_path(config, width) is not None:
            types: Any = config.get("num_res_types") or EsmFold2Config.num_res_types
            taken = 2 * types + 1 if width == "single_inputs_size" else 0
            set_at_path(config, ours, at_path(config, width) - taken)
    if (width := at_path(config, "esmc_config.hidden_size")) and not at_path(config, "esmc_config.num_attention_heads"):
        # The config of the language model's own repository replaces this one.
        set_at_path(config, "esmc_config.num_attention_heads", max(1, width // ESMC_HEAD))
    config.setdefault("esmc_id", ESMC)
    known = EsmFold2Config().to_dict()
    return {
        name: declared(value, known[name]) if isinstance(known.get(name), dict) and isinstance(value, dict) else value
        for name, value in config.items()
        if name not in OTHERS
    }


def declared(fields: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a part of transformers' config has, also in its parts."""
    return {
        name: declared(value, known[name]) if isinstance(value, dict) and isinstance(known[name], dict) else value
        for name, value in fields.items()
        if name in known
    }


def check_config(config: MLXEsmFold2Config) -> None:
    """Check that a model can be built from a config.

    Raises:
        ValueError: an invalid or unsupported value.
    """
    check_esmc_config(config.esmc_config)
    diffusion = config.structure_head.diffusion_module
    sizes = {
        "": ("hidden_size", "pairwise_hidden_size", "single_inputs_size", "pair_transition_intermediate_size"),
        "atom_encoder.": ("hidden_size", "num_attention_heads", "num_hidden_layers", "output_dim"),
        "structure_head.diffusion_module.": ("hidden_size", "num_attention_heads", "num_hidden_layers", "fourier_dim"),
        "msa_encoder.": ("hidden_size", "outer_hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        "confidence_head.": ("num_plddt_bins", "num_pae_bins", "num_pde_bins", "distogram_bins"),
    }
    for prefix, names in sizes.items():
        part: Any = config
        for step in prefix.split(".")[:-1]:
            part = getattr(part, step)
        for name in names:
            if not 0 < getattr(part, name) < 1 << 31:
                raise UserError(f"The config's {prefix}{name} must be positive, got {getattr(part, name)}.")
    for prefix, part in (
        ("atom_encoder", config.atom_encoder),
        ("structure_head.diffusion_module", diffusion),
        ("structure_head.diffusion_module.atom_encoder", diffusion.atom_encoder),
    ):
        if part.head_dim * part.num_attention_heads != part.hidden_size:
            raise UserError(
                f"The config's {prefix}.head_dim times num_attention_heads must be hidden_size ({part.hidden_size}), "
                f"got {part.head_dim} times {part.num_attention_heads}."
            )
    if config.sliding_window < 2:
        raise UserError(f"The config's sliding_window must be at least 2, got {config.sliding_window}.")
    if not 0 <= config.lm_encoder.lm_dropout < 1:
        raise UserError(f"The config's lm_encoder.lm_dropout must be in [0, 1), got {config.lm_encoder.lm_dropout}.")


def as_mlx_config(config: PreTrainedConfig) -> MLXEsmFold2Config:
    """Return `config` itself if it is an `MLXEsmFold2Config`, otherwise convert a plain `EsmFold2Config`."""
    ours = config if isinstance(config, MLXEsmFold2Config) else MLXEsmFold2Config.from_dict(config.to_dict())
    ours.esmc_config = as_esmc_config(ours.esmc_config)
    return ours
