"""Configuration of ESMC."""

from typing import TYPE_CHECKING, Any

from transformers import EsmcConfig, PreTrainedConfig

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.models.others import model_type_of


class MLXEsmcConfig(EsmcConfig):
    """transformers' `EsmcConfig` for the MLX models, which accept a plain `EsmcConfig` as well.

    Raises:
        ValueError: in `from_dict` and `from_pretrained`, for a `model_type` other than "esmc".

    Example:
        >>> from mlx_esm_hf import MLXEsmcConfig
        >>> config = MLXEsmcConfig(hidden_size=960, num_hidden_layers=30, num_attention_heads=15,
        ...                        intermediate_size=2560)
    """

    if TYPE_CHECKING:  # optional in transformers, but always set here
        pad_token_id: int
        mask_token_id: int
        head_dim: int
        rope_parameters: dict[str, Any]
        num_labels: int
        output_attentions: bool
        output_hidden_states: bool

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config that `config_dict` describes; `kwargs` as in `PreTrainedConfig.from_dict`."""
        model_type = model_type_of(config_dict, config_dict.get("_name_or_path", ""), cls.model_type)
        if model_type != cls.model_type:
            raise UserError(
                f"{cls.__name__} expected model_type {cls.model_type!r}, got {model_type!r}. Load the config with the "
                "class it belongs to, or with an Auto class."
            )
        return super().from_dict(config_dict, **kwargs)


def check_config(config: MLXEsmcConfig) -> None:
    """Check that a model can be built from a config.

    Raises:
        ValueError: an invalid or unsupported value.
    """
    if config.pad_token_id is None or config.mask_token_id is None:
        raise UserError("The config must set pad_token_id and mask_token_id.")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if not 0 < getattr(config, name) < 1 << 31:
            raise UserError(f"The config's {name} must be at least 1 and below 2^31, got {getattr(config, name)}.")
    if not 0 <= config.pad_token_id < config.vocab_size:
        raise UserError(
            f"The config's pad_token_id must be between 0 and {config.vocab_size - 1}, got {config.pad_token_id}."
        )
    if config.head_dim is None or config.head_dim * config.num_attention_heads != config.hidden_size:
        raise UserError(
            f"The config's head_dim times num_attention_heads must be hidden_size ({config.hidden_size}), got "
            f"{config.head_dim} times {config.num_attention_heads}."
        )
    if config.head_dim % 2:
        raise UserError(f"The config's head_dim must be even for rotary positions, got {config.head_dim}.")
    if config.hidden_act != "silu":
        raise UserError(f"The config's hidden_act must be 'silu' (ESMC uses SwiGLU), got {config.hidden_act!r}.")
    if config.rope_parameters.get("rope_type", "default") != "default":
        raise UserError(f"The config's rope_type must be 'default', got {config.rope_parameters['rope_type']!r}.")
    if config.tie_word_embeddings:
        raise UserError("The config's tie_word_embeddings must be False: ESMC has a separate output projection.")


def as_mlx_config(config: PreTrainedConfig) -> MLXEsmcConfig:
    """Return `config` itself if it is an `MLXEsmcConfig`, otherwise convert a plain `EsmcConfig`."""
    return config if isinstance(config, MLXEsmcConfig) else MLXEsmcConfig.from_dict(config.to_dict())
