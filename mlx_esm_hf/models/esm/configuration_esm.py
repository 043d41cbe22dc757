"""Configurations of the ESM family: all differences between ESM-1, ESM-1b, ESM-1v and ESM-2."""

from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, EsmConfig, PreTrainedConfig

from mlx_esm_hf.demo import shown_name
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.models.others import model_type_of

GENERIC_FIELDS = frozenset(PreTrainedConfig().to_dict())
POSITION_EMBEDDING_TYPES = ("absolute", "rotary", "sinusoidal")


class MLXEsmConfig(EsmConfig):
    """transformers' `EsmConfig` for the MLX models ESM-1b, ESM-1v and ESM-2.

    It saves the same `config.json`, and the models accept a plain `EsmConfig` as well. `from_dict` and
    `from_pretrained` return an `MLXEsm1Config` if `model_type` is "esm1".

    The class attributes are ESM-1's settings. In this class they are constants and are not saved.

    Raises:
        ValueError: a `model_type` of another family, an unknown `position_embedding_type`, or a setting of ESM-1 (use
            `MLXEsm1Config`).

    Example:
        >>> from mlx_esm_hf import MLXEsmConfig
        >>> config = MLXEsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, hidden_size=320,
        ...                       num_attention_heads=20, position_embedding_type="rotary")
    """

    if TYPE_CHECKING:  # optional in transformers, but a model needs them
        vocab_size: int
        pad_token_id: int
        layer_norm_eps: float
        num_labels: int
        output_attentions: bool
        output_hidden_states: bool
        esmfold_config: Any
        vocab_list: Any

    scale_embedding: ClassVar[bool] = False
    add_bias_kv: ClassVar[bool] = False
    emb_layer_norm_after: ClassVar[bool] = True
    lm_head_transform: ClassVar[bool] = True
    lm_head_bias: ClassVar[bool] = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.position_embedding_type not in POSITION_EMBEDDING_TYPES:
            raise UserError(
                f"position_embedding_type must be one of {POSITION_EMBEDDING_TYPES}, got "
                f"{self.position_embedding_type!r}."
            )
        if self.model_type == MLXEsmConfig.model_type:
            ours = [name for name in ESM1_FIELDS if getattr(self, name) != getattr(MLXEsmConfig, name)]
            if self.position_embedding_type == "sinusoidal":
                ours.append("position_embedding_type")
            if ours:
                raise UserError(
                    f"{', '.join(ours)} must not be set for model_type 'esm': transformers would ignore these settings "
                    "of ESM-1. Use MLXEsm1Config."
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as transformers does, but without generic fields in the settings of folding.

        Folding does not use these fields, and transformers 4 cannot load a config that has them there.
        """
        config_dict = super().to_dict()
        nested = config_dict
        for name in ("esmfold_config", "trunk", "structure_module"):
            if not nested.get(name):
                break
            nested[name] = {key: value for key, value in nested[name].items() if key not in GENERIC_FIELDS}
            nested = nested[name]
        return config_dict

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return a config of the class for its `model_type`; `kwargs` as in `PreTrainedConfig.from_dict`.

        "fast_esm" (FastPLMs' ESM-2) is read as "esm", which has the same network and parameter names.

        Raises:
            ValueError: the `model_type` of another family, or a network that only looks like ESM.
        """
        model_type = model_type_of(config_dict, config_dict.get("_name_or_path", ""), cls.model_type)
        if model_type not in CONFIG_CLASSES:
            raise UserError(
                f"{cls.__name__} expected model_type {' or '.join(map(repr, CONFIG_CLASSES))}, got {model_type!r}. "
                "Load the config with the class it belongs to."
            )
        # No code of a repository is run, so a saved config does not refer to any.
        fields = {name: value for name, value in config_dict.items() if name != "auto_map"} | {"model_type": model_type}
        return super(MLXEsmConfig, CONFIG_CLASSES[model_type]).from_dict(fields, **kwargs)


@strict
class MLXEsm1Config(MLXEsmConfig):
    """ESM-1 (Rives et al. 2019; fair-esm's `ProteinBertModel`, arch `protein_bert_base`).

    The defaults are those of `esm1_t34_670M_UR50S`. transformers has no ESM-1 and refuses such a config because of its
    `model_type` and a `max_position_embeddings` of None (there is no position table).

    Args:
        scale_embedding: multiply the word embeddings by √hidden_size.
        add_bias_kv: add a learned key and value (`bias_k`, `bias_v`) that all queries attend to.
        emb_layer_norm_after: apply a layer norm after the last layer.
        lm_head_transform: apply dense, GELU and layer norm before the output projection.
        lm_head_bias: the output projection has a bias (fair-esm's `final_bias`).
        vocab_list: the tokens, if they differ from fair-esm's ESM-1.
    """

    model_type = "esm1"

    vocab_size: int = 35
    mask_token_id: int = 33
    pad_token_id: int = 1
    bos_token_id: int | None = 32
    eos_token_id: int | list[int] | None = None
    hidden_size: int = 1280
    num_hidden_layers: int = 34
    num_attention_heads: int = 20
    intermediate_size: int = 5120
    hidden_dropout_prob: float | None = 0.0
    attention_probs_dropout_prob: float | None = 0.0
    layer_norm_eps: float = 1e-12
    max_position_embeddings: int | None = None  # type: ignore[assignment]
    position_embedding_type: str | None = "sinusoidal"
    tie_word_embeddings: bool = False
    scale_embedding: bool = True  # type: ignore[misc]
    add_bias_kv: bool = True  # type: ignore[misc]
    emb_layer_norm_after: bool = False  # type: ignore[misc]
    lm_head_transform: bool = False  # type: ignore[misc]
    lm_head_bias: bool = True  # type: ignore[misc]

    def __post_init__(self, **kwargs: Any) -> None:
        vocab_list = self.vocab_list
        super().__post_init__(**kwargs)
        self.vocab_list = vocab_list  # transformers keeps it for ESMFold only


ESM1_FIELDS = ("scale_embedding", "add_bias_kv", "emb_layer_norm_after", "lm_head_transform", "lm_head_bias")
CONFIG_CLASSES: dict[str, type[MLXEsmConfig]] = {c.model_type: c for c in (MLXEsmConfig, MLXEsm1Config)}
AutoConfig.register(MLXEsm1Config.model_type, MLXEsm1Config)


def check_config(config: MLXEsmConfig, folds: bool = False) -> None:
    """Check that a model can be built from a config.

    Args:
        config: the config.
        folds: whether it is for a folding model.

    Raises:
        ValueError: an invalid or unsupported value.
    """
    for option in ("is_decoder", "add_cross_attention"):
        if getattr(config, option, False):
            raise UserError(f"{option}=True is not supported: the models are encoders. Set {option}=False.")
    if config.is_folding_model and not folds:
        raise UserError(
            f"{quoted_name(config)} is a folding model (is_folding_model=True). Fold with `mlx-esm fold` or "
            "MLXEsmForProteinFolding, use a language model such as facebook/esm2_t33_650M_UR50D, or pass "
            "is_folding_model=False to from_pretrained for its language model."
        )
    if folds:
        check_folding_config(config)
    if config.vocab_size is None or config.pad_token_id is None:
        raise UserError("The config must set vocab_size and pad_token_id.")
    if config.token_dropout and config.mask_token_id is None:
        raise UserError(
            "The config must set mask_token_id if it sets token_dropout=True, which scales the embeddings by the share "
            "of masked tokens. Pass mask_token_id (32 for ESM-1b, ESM-1v and ESM-2) or token_dropout=False."
        )
    sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    if config.position_embedding_type == "absolute":
        sizes.append("max_position_embeddings")
    for name in sizes:
        if not 0 < getattr(config, name) < 1 << 31:
            raise UserError(f"The config's {name} must be at least 1 and below 2^31, got {getattr(config, name)}.")
    if not 0 <= config.pad_token_id < config.vocab_size:
        raise UserError(
            f"The config's pad_token_id must be between 0 and {config.vocab_size - 1}, got {config.pad_token_id}."
        )
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"The config's hidden_size ({config.hidden_size}) must be a multiple of num_attention_heads "
            f"({config.num_attention_heads})."
        )
    if config.layer_norm_eps is None or not config.layer_norm_eps > 0:
        raise UserError(f"The config's layer_norm_eps must be positive, got {config.layer_norm_eps}.")


def quoted_name(config: MLXEsmConfig) -> str:
    """Return the name of a config's model in backquotes, or "This model" if it has none."""
    return f"`{shown_name(config.name_or_path)}`" if config.name_or_path else "This model"


def check_folding_config(config: MLXEsmConfig) -> None:
    """Check the settings of folding.

    Raises:
        ValueError: an invalid or unsupported value.
    """
    if not config.is_folding_model:
        raise UserError(
            f"{quoted_name(config)} is a language model. Folding needs an ESMFold model such as facebook/esmfold_v1."
        )
    fold: Any = config.esmfold_config
    trunk, structure = fold.trunk, fold.trunk.structure_module
    for state, head in (("sequence_state_dim", "sequence_head_width"), ("pairwise_state_dim", "pairwise_head_width")):
        if getattr(trunk, state) % getattr(trunk, head):
            raise UserError(
                f"The trunk's {state} ({getattr(trunk, state)}) must be a multiple of {head} ({getattr(trunk, head)})."
            )
    if structure.num_angles != 7:
        raise UserError(f"The structure module's num_angles must be 7, got {structure.num_angles}.")
    vocabulary = config.vocab_list or ()
    needed = ("<cls>", "<pad>", "<eos>", "<mask>", *"ARNDCQEGHILKMFPSTWYVX")
    if missing := [token for token in needed if token not in vocabulary]:
        raise UserError(f"The config's vocab_list lacks {', '.join(missing)}.")


def as_mlx_config(config: PreTrainedConfig) -> MLXEsmConfig:
    """Return `config` itself if it is an `MLXEsmConfig`, otherwise convert a plain `EsmConfig`."""
    return config if isinstance(config, MLXEsmConfig) else MLXEsmConfig.from_dict(config.to_dict())
