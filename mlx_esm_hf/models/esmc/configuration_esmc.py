"""Configurations of ESMC."""

from typing import TYPE_CHECKING, Any

from transformers import EsmcConfig, PreTrainedConfig

from mlx_esm_hf.errors import UserError


class MLXEsmcConfig(EsmcConfig):
    """transformers' `EsmcConfig`, as the MLX models read it; a plain `EsmcConfig` is accepted wherever this one is.

    Raises:
        ValueError: `from_dict` and `from_pretrained`, a `model_type` that is not ESMC's.

    Example:
        >>> config = MLXEsmcConfig(hidden_size=960, num_hidden_layers=30, num_attention_heads=15,
        ...                        intermediate_size=2560)
    """

    if TYPE_CHECKING:  # transformers leaves these open, and sets them
        pad_token_id: int  # type: ignore[assignment]
        mask_token_id: int  # type: ignore[assignment]
        rope_parameters: dict[str, Any]
        num_labels: int
        output_attentions: bool  # type: ignore[assignment]
        output_hidden_states: bool  # type: ignore[assignment]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config that `config_dict` describes; `kwargs` as in `PreTrainedConfig.from_dict`."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise UserError(
                f"This config has model_type {model_type!r}, and this class reads {cls.model_type!r}. Load it with the "
                "class it was made for, or with one of the Auto classes."
            )
        return super().from_dict(config_dict, **kwargs)


def check_config(config: MLXEsmcConfig) -> None:
    """
    Raises:
        ValueError: values that no model here can have.
    """
    if config.pad_token_id is None or config.mask_token_id is None:
        raise UserError("The config has to give pad_token_id and mask_token_id.")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if not 0 < getattr(config, name) < 1 << 31:
            raise UserError(f"The config has {name} = {getattr(config, name)}: it must be 1 at least, and below 2^31.")
    if not 0 <= config.pad_token_id < config.vocab_size:
        raise UserError(
            f"The config has pad_token_id = {config.pad_token_id}: not a token of its vocabulary, which has "
            f"{config.vocab_size}."
        )
    if config.head_dim is None or config.head_dim * config.num_attention_heads != config.hidden_size:
        raise UserError(
            f"The config has {config.num_attention_heads} heads of {config.head_dim}, and a hidden size of "
            f"{config.hidden_size}: in ESMC the heads together are as wide as the hidden size."
        )
    if config.head_dim % 2:
        raise UserError(f"The config has heads of {config.head_dim}: rotary positions need an even number.")
    if config.hidden_act != "silu":
        raise UserError(f"The config has hidden_act = {config.hidden_act!r}: ESMC has SwiGLU, whose part is 'silu'.")
    if config.rope_parameters.get("rope_type", "default") != "default":
        raise UserError(
            f"The config has rope_type = {config.rope_parameters['rope_type']!r}: only 'default' is supported."
        )
    if config.tie_word_embeddings:
        raise UserError("The config has tie_word_embeddings = True: ESMC's output projection is always its own.")


def as_mlx_config(config: PreTrainedConfig) -> MLXEsmcConfig:
    """`config` itself if it is one of ours, else the MLX twin of a plain `EsmcConfig`."""
    return config if isinstance(config, MLXEsmcConfig) else MLXEsmcConfig.from_dict(config.to_dict())
