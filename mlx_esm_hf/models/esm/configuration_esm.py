"""Configurations of the ESM family: everything in which ESM-1, ESM-1b, ESM-1v and ESM-2 differ."""

from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, EsmConfig, PreTrainedConfig

from mlx_esm_hf.errors import UserError

GENERIC_FIELDS = frozenset(PreTrainedConfig().to_dict())
POSITION_EMBEDDING_TYPES = ("absolute", "rotary", "sinusoidal")


class MLXEsmConfig(EsmConfig):
    """transformers' `EsmConfig`, as the MLX models read it: ESM-1b, ESM-1v and ESM-2.

    It saves to the same `config.json`, and a plain `EsmConfig` is accepted wherever this one is.
    `from_dict` and `from_pretrained` return an `MLXEsm1Config` where `model_type` is `"esm1"`.

    The class attributes are what ESM-1 does differently; in this class they are constants and are not saved.

    Raises:
        ValueError: a `model_type` that is not ESM's, an unknown `position_embedding_type`, or one of
            ESM-1's own settings, which `MLXEsm1Config` holds under a `model_type` of its own.

    Example:
        >>> config = MLXEsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, hidden_size=320,
        ...                       num_attention_heads=20, position_embedding_type="rotary")
    """

    if TYPE_CHECKING:  # transformers leaves these open; a model is not built without them
        vocab_size: int  # type: ignore[assignment]
        mask_token_id: int  # type: ignore[assignment]
        pad_token_id: int  # type: ignore[assignment]
        layer_norm_eps: float  # type: ignore[assignment]
        num_labels: int
        output_attentions: bool  # type: ignore[assignment]
        output_hidden_states: bool  # type: ignore[assignment]
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
                f"position_embedding_type={self.position_embedding_type!r} is not one of {POSITION_EMBEDDING_TYPES}."
            )
        if self.model_type == MLXEsmConfig.model_type:
            ours = [name for name in ESM1_FIELDS if getattr(self, name) != getattr(MLXEsmConfig, name)]
            if self.position_embedding_type == "sinusoidal":
                ours.append("position_embedding_type")
            if ours:
                raise UserError(
                    f"{', '.join(ours)}: only ESM-1 has this, and a config with model_type 'esm' must mean to "
                    "transformers what it means here. Use MLXEsm1Config."
                )

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, but the settings of folding without the fields that every config there has.

        Nothing in folding reads those, and transformers 4 loads no config that has them there.
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
        """The config of the class that `model_type` names; `kwargs` as in `PreTrainedConfig.from_dict`."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type not in CONFIG_CLASSES:
            raise UserError(
                f"This config has model_type {model_type!r}; "
                f"this library reads {', '.join(map(repr, CONFIG_CLASSES))}. Load it with the class it was made for."
            )
        return super(MLXEsmConfig, CONFIG_CLASSES[model_type]).from_dict(config_dict, **kwargs)


@strict
class MLXEsm1Config(MLXEsmConfig):
    """ESM-1 (Rives et al. 2019; fair-esm's `ProteinBertModel`, arch `protein_bert_base`).

    The defaults are those of `esm1_t34_670M_UR50S`. transformers has no ESM-1: the `model_type` of its own, and a
    `max_position_embeddings` of None (there is no table that could end), make it refuse such a config.

    Args:
        scale_embedding: multiply the word embeddings by √hidden_size.
        add_bias_kv: attention has one more, learned, key and value (`bias_k`, `bias_v`), which no query may miss.
        emb_layer_norm_after: a layer norm behind the last layer. ESM-1 has none.
        lm_head_transform: dense, GELU and layer norm before the output projection. ESM-1 has none.
        lm_head_bias: the output projection has a bias (fair-esm's `final_bias`).
        vocab_list: the tokens, where they are not those of fair-esm's ESM-1.
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
        self.vocab_list = vocab_list  # which transformers keeps for ESMFold alone


ESM1_FIELDS = ("scale_embedding", "add_bias_kv", "emb_layer_norm_after", "lm_head_transform", "lm_head_bias")
CONFIG_CLASSES: dict[str, type[MLXEsmConfig]] = {c.model_type: c for c in (MLXEsmConfig, MLXEsm1Config)}
AutoConfig.register(MLXEsm1Config.model_type, MLXEsm1Config)


def check_config(config: MLXEsmConfig, folds: bool = False) -> None:
    """
    Args:
        folds: whether it is for a folding model.

    Raises:
        ValueError: values that no model here can have.
    """
    for option in ("is_decoder", "add_cross_attention"):
        if getattr(config, option, False):
            raise UserError(f"{option}=True is not supported: ESM here is an encoder. Set {option}=False.")
    if config.is_folding_model and not folds:
        raise UserError(
            "is_folding_model=True is not supported by this class: MLXEsmForProteinFolding folds. "
            "Set is_folding_model=False for a language model alone."
        )
    if folds:
        check_folding_config(config)
    if config.vocab_size is None or config.pad_token_id is None or config.mask_token_id is None:
        raise UserError("The config has to give vocab_size, pad_token_id and mask_token_id.")
    sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    if config.position_embedding_type == "absolute":
        sizes.append("max_position_embeddings")
    for name in sizes:
        if not 0 < getattr(config, name) < 1 << 31:
            raise UserError(f"The config has {name} = {getattr(config, name)}: it must be 1 at least, and below 2^31.")
    if not 0 <= config.pad_token_id < config.vocab_size:
        raise UserError(
            f"The config has pad_token_id = {config.pad_token_id}: not a token of its vocabulary, which has "
            f"{config.vocab_size}."
        )
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"The hidden size ({config.hidden_size}) is not a multiple of the number of attention heads "
            f"({config.num_attention_heads})."
        )
    if config.layer_norm_eps is None or not config.layer_norm_eps > 0:
        raise UserError(f"The config has layer_norm_eps = {config.layer_norm_eps}: it must be positive.")


def check_folding_config(config: MLXEsmConfig) -> None:
    """
    Raises:
        ValueError: values that no folding model can have.
    """
    if not config.is_folding_model:
        raise UserError("is_folding_model=False: this config is that of a language model, which does not fold.")
    fold: Any = config.esmfold_config
    trunk, structure = fold.trunk, fold.trunk.structure_module
    for state, head in (("sequence_state_dim", "sequence_head_width"), ("pairwise_state_dim", "pairwise_head_width")):
        if getattr(trunk, state) % getattr(trunk, head):
            raise UserError(
                f"The trunk's {state} ({getattr(trunk, state)}) is not a multiple of its {head} "
                f"({getattr(trunk, head)})."
            )
    if structure.num_angles != 7:
        raise UserError(f"The structure module has num_angles = {structure.num_angles}; a residue has 7.")
    vocabulary = config.vocab_list or ()
    needed = ("<cls>", "<pad>", "<eos>", "<mask>", *"ARNDCQEGHILKMFPSTWYVX")
    if missing := [token for token in needed if token not in vocabulary]:
        raise UserError(f"The config's vocab_list lacks {', '.join(missing)}.")


def as_mlx_config(config: PreTrainedConfig) -> MLXEsmConfig:
    """`config` itself if it is one of ours, else the MLX twin of a plain `EsmConfig`."""
    return config if isinstance(config, MLXEsmConfig) else MLXEsmConfig.from_dict(config.to_dict())
