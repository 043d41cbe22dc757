"""Choose the model class by the `model_type` of a checkpoint's config; mirrors transformers' `AutoModel`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from transformers import PreTrainedConfig

from mlx_esm_hf.checkpoint.resolve import find_file
from mlx_esm_hf.demo import shown_name
from mlx_esm_hf.errors import CheckpointError, UserError
from mlx_esm_hf.loading import commit_of, load_config, read_config
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.models.esm.configuration_esm import MLXEsm1Config, MLXEsmConfig
from mlx_esm_hf.models.esm.modeling_esm import (
    MLXEsmForMaskedLM,
    MLXEsmForSequenceClassification,
    MLXEsmForTokenClassification,
    MLXEsmModel,
)
from mlx_esm_hf.models.esmc.configuration_esmc import MLXEsmcConfig
from mlx_esm_hf.models.esmc.modeling_esmc import (
    MLXEsmcForMaskedLM,
    MLXEsmcForSequenceClassification,
    MLXEsmcForTokenClassification,
    MLXEsmcModel,
)
from mlx_esm_hf.models.esmfold.modeling_esmfold import MLXEsmForProteinFolding
from mlx_esm_hf.models.esmfold2.configuration_esmfold2 import MLXEsmFold2Config
from mlx_esm_hf.models.esmfold2.modeling_esmfold2 import MLXEsmFold2Model
from mlx_esm_hf.models.others import model_type_of
from mlx_esm_hf.quantization.layers import declared_specs
from mlx_esm_hf.training.adapters.files import base_of

MOST_LAYERS = 1000


class AutoClass:
    """Base of the Auto classes, which have no instances: `from_pretrained` returns a model of the matching class."""

    models: ClassVar[dict[str, type[MLXPreTrainedModel]]]  # {model_type: class}

    @classmethod
    def register(cls, config_class: type[PreTrainedConfig], model_class: type[MLXPreTrainedModel]) -> None:
        """Add a model class for the `model_type` of a config class."""
        cls.models[config_class.model_type] = model_class

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """Return a model with random weights."""
        return cls._class_for({"model_type": config.model_type}, type(config).__name__)(config, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint into the class for its `model_type`.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            config: a config, Hub id or folder to use instead of the checkpoint's config.
            kwargs: see `MLXPreTrainedModel.from_pretrained`.

        Returns:
            The result of `MLXPreTrainedModel.from_pretrained`.

        Raises:
            ValueError: no class is registered for this `model_type`. Other errors are those of
                `MLXPreTrainedModel.from_pretrained`.

        Example:
            >>> from mlx_esm_hf import MLXAutoModelForMaskedLM
            >>> model = MLXAutoModelForMaskedLM.from_pretrained("facebook/esm2_t6_8M_UR50D")
        """
        source = pretrained_model_name_or_path if config is None else config
        if isinstance(source, PreTrainedConfig):
            fields = source.to_dict()
        else:
            where = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download")
            hub = {name: kwargs[name] for name in where if name in kwargs}
            if config is None:  # resolve once, so that config and weights belong to one commit
                kwargs["revision"] = hub["revision"] = commit_of(str(source), **hub)
                source, hub = config_place(str(source), hub)
            fields = read_config(str(source), **hub)
        name = type(source).__name__ if isinstance(source, PreTrainedConfig) else str(source)
        model_class = cls._class_for(fields, name)
        return model_class.from_pretrained(pretrained_model_name_or_path, config=config, **kwargs)

    @classmethod
    def _class_for(cls, fields: dict[str, Any], source: str) -> Any:
        model_type = model_type_of(fields, source)
        if model_type == MLXEsmFold2Config.model_type and model_type not in cls.models:
            refuse_folding(source)
        if not isinstance(model_type, str) or model_type not in cls.models:
            raise UserError(
                f"{cls.__name__} has no class for model_type {model_type!r} of {source}, expected one of "
                f"{', '.join(map(repr, cls.models))}."
            )
        return cls.models[model_type]


def refuse_folding(source: str) -> NoReturn:
    """Raise UserError for an ESMFold2 where a language model is needed; `source` is its Hub id or folder."""
    raise UserError(
        f"`{shown_name(source)}` is an ESMFold2, which predicts structures. Fold with `mlx-esm fold` or "
        "MLXEsmFold2Model, or use a language model, such as biohub/ESMC-600M."
    )


class MLXAutoModel(AutoClass):
    """A model without a head."""

    models: ClassVar = {
        MLXEsmConfig.model_type: MLXEsmModel,
        MLXEsm1Config.model_type: MLXEsmModel,
        MLXEsmcConfig.model_type: MLXEsmcModel,
        MLXEsmFold2Config.model_type: MLXEsmFold2Model,
    }


class MLXAutoModelForFolding(AutoClass):
    """A model that predicts structures."""

    models: ClassVar = {
        MLXEsmConfig.model_type: MLXEsmForProteinFolding,
        MLXEsmFold2Config.model_type: MLXEsmFold2Model,
    }


class MLXAutoModelForMaskedLM(AutoClass):
    """A model with a language-model head."""

    models: ClassVar = {
        MLXEsmConfig.model_type: MLXEsmForMaskedLM,
        MLXEsm1Config.model_type: MLXEsmForMaskedLM,
        MLXEsmcConfig.model_type: MLXEsmcForMaskedLM,
    }


class MLXAutoModelForSequenceClassification(AutoClass):
    """A model with a classifier or regressor for whole sequences."""

    models: ClassVar = {
        MLXEsmConfig.model_type: MLXEsmForSequenceClassification,
        MLXEsm1Config.model_type: MLXEsmForSequenceClassification,
        MLXEsmcConfig.model_type: MLXEsmcForSequenceClassification,
    }


class MLXAutoModelForTokenClassification(AutoClass):
    """A model with a classifier for each token."""

    models: ClassVar = {
        MLXEsmConfig.model_type: MLXEsmForTokenClassification,
        MLXEsm1Config.model_type: MLXEsmForTokenClassification,
        MLXEsmcConfig.model_type: MLXEsmcForTokenClassification,
    }


def config_place(source: str, hub: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return where the config of a model is, and the arguments of `find_file` for it: for an adapter, its base model.

    Args:
        source: Hub id or folder.
        hub: arguments of `find_file`.
    """
    base = base_of(source, **hub)
    if base is None:
        return source, hub
    return base.source, hub | {"revision": base.resolve(hub), "subfolder": ""}


def tokenizer_place(source: str, hub: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return where the tokenizer of a model is; see `config_place`. An adapter may have its own."""
    if find_file(source, "tokenizer_config.json", **hub) is not None:
        return source, hub
    where = {name: hub[name] for name in ("token", "cache_dir", "local_files_only") if name in hub}
    resolved = commit_of(source, hub.get("revision", "main"), **where)
    place, hub_of_base = config_place(source, hub | {"revision": resolved})
    return (source, hub) if place == source else (place, hub_of_base)


@dataclass
class Checkpoint:
    """A checkpoint whose config has been read and checked, and whose weights have not.

    Attributes:
        model_class: class of the model.
        config: its config.
        source: Hub id or folder.
        hub: arguments of `find_file`, with the resolved revision.
    """

    model_class: type[MLXPreTrainedModel]
    config: Any
    source: str
    hub: dict[str, Any]

    @property
    def max_tokens(self) -> int | None:
        """Maximum number of tokens in a row; None if unlimited."""
        return self.model_class.max_tokens_of(self.config)

    @property
    def residues(self) -> dict[str, int]:
        """{residue: token id} in the published vocabularies of the model's family."""
        return self.model_class.residues

    @property
    def commit(self) -> dict[str, str]:
        """`{"revision": commit}`, so that other files are read from the same commit; empty for a folder."""
        commit = None if os.path.isdir(self.source) else getattr(self.hub["revision"], "resolved", None)
        return {"revision": commit} if commit else {}

    def skeleton(self) -> Any:
        """Return a model with random weights, to check names of layers. MLX computes none of the weights.

        Raises:
            CheckpointError: the config has more layers than any model.
        """
        layers = self.model_class.language_config(self.config).num_hidden_layers
        if layers > MOST_LAYERS:
            raise CheckpointError(f"The config.json of {self.source} has {layers} layers.")
        return self.model_class(self.config)

    def load(self, **options: Any) -> Any:
        """Load the weights; `options` are those of `MLXPreTrainedModel.from_pretrained`."""
        return self.model_class.from_pretrained(self.source, **self.hub, **options)


def open_checkpoint(cls: Any, source: str, revision: str | None = None, **hub: Any) -> Checkpoint:
    """Read and check the config of a checkpoint, but not its weights.

    Args:
        cls: an Auto class or a model class.
        source: Hub id or folder.
        revision: branch, tag or commit; None for main.
        hub: the other arguments of `find_file`.

    Raises:
        UserError: the class cannot load this model.
        OSError: the repository or its config was not found.
    """
    hub["revision"] = commit_of(source, revision or "main", **hub)
    place, where = config_place(source, hub)
    if issubclass(cls, AutoClass):
        cls = cls._class_for(read_config(place, **where), place)
    config, _ = load_config(cls, place, {}, **where)
    config = cls.checked_config(config)
    declared_specs(config, (), cls.base_model_prefix, source)  # refuses checkpoints that are quantized for torch
    return Checkpoint(cls, config, source, hub)
