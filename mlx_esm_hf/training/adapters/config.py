"""What adapters look like and where they go: PEFT's `LoraConfig` and `adapter_config.json`."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mlx_esm_hf.checks import check_choice
from mlx_esm_hf.errors import CheckpointError, UserError

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"  # a `target_modules` of PEFT: every linear layer except the output projection

# PEFT trains and saves these heads for these tasks, in addition to `modules_to_save`.
CLASSIFICATION_TASKS = ("SEQ_CLS", "TOKEN_CLS")
CLASSIFICATION_HEADS = ("classifier", "score")

# Values of `init_lora_weights` that change the weights of the base model.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
INITIALIZATIONS = (True, False, "gaussian")
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, kw_only=True)
class OtherFields:
    """Fields of PEFT's `LoraConfig` that must not be set, as they change what an adapter computes."""

    alora_invocation_tokens: Any = None
    arrow_config: Any = None
    fan_in_fan_out: bool = False
    kasa_config: Any = None
    layer_replication: Any = None
    lora_bias: bool = False
    megatron_config: Any = None
    monteclora_config: Any = None
    target_parameters: Any = None
    trainable_token_indices: Any = None
    use_bdlora: Any = None
    use_qalora: bool = False
    velora_config: Any = None

    def __post_init__(self) -> None:
        for other in fields(OtherFields):
            value = getattr(self, other.name)
            if value not in (None, False, [], {}):
                raise UserError(
                    f"{other.name}={value!r} is not supported and changes what the adapter computes. It must be "
                    f"{other.default!r}."
                )


# Fields of PEFT's `LoraConfig` without effect here: they describe the origin and initialization of an adapter, or
# belong to a field that must not be set.
IGNORED_FIELDS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip


@dataclass(frozen=True)
class LoraConfig(OtherFields):
    """What adapters look like and where they go: PEFT's `LoraConfig`.

    Args:
        r: rank of the product B · A that is added to a weight.
        lora_alpha: the product is scaled by `lora_alpha / r`, with `use_rslora` by `lora_alpha / √r`.
        lora_dropout: dropout probability of the adapter's input in training.
        target_modules: the layers to adapt: suffixes of their names, a regular expression for whole names, or
            "all-linear" for all except the projection to the vocabulary. The default is PEFT's for BERT, as PEFT has
            none for ESM.
        modules_to_save: name suffixes of modules to train and save in full, such as "classifier". With a `task_type`
            of "SEQ_CLS" or "TOKEN_CLS", "classifier" and "score" are included, as in PEFT.
        use_dora: train the magnitude of each row of the weight separately from its direction (DoRA).
        use_rslora: scale by `lora_alpha / √r`.
        rank_pattern: another r for some layers: {name suffix, or a regular expression for it: r}.
        alpha_pattern: another lora_alpha for some layers, in the same form.
        bias: biases to train as well: "none", "all", or "lora_only" for those of the adapted layers.
        task_type: PEFT's name of the task, written into the file.
        exclude_modules: layers not to adapt, in the form of `target_modules`.
        layers_to_transform: number, or numbers, of the layers to adapt.
        layers_pattern: name, or names, of the lists that `layers_to_transform` counts in; None for any list.
        init_lora_weights: initialization of A: uniform (True) or normal ("gaussian"); B is zero. With False B is not
            zero either, so new adapters change the outputs.
        ensure_weight_tying: must be False if the embedding or the output projection of a tied model is trained.

    The other fields of PEFT's class are accepted at values without effect.

    Raises:
        ValueError: a value is invalid or not supported.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: Sequence[str] | str = ("query", "value")
    modules_to_save: Sequence[str] | None = None
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    task_type: str | None = None
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    init_lora_weights: bool | str = True
    ensure_weight_tying: bool = False

    @classmethod
    def from_peft(cls, config: Any) -> LoraConfig:
        """Return the configuration of PEFT's object.

        Raises:
            UserError: it is not for LoRA, or has an invalid or unsupported value.
        """
        return cls.from_fields(config.to_dict())

    @classmethod
    def from_fields(cls, found: Mapping[str, Any]) -> LoraConfig:
        """Return the configuration with these fields of PEFT's class; None stands for the default.

        Raises:
            UserError: it is not for LoRA, or has an invalid or unsupported value.
        """
        kind = getattr(found.get("peft_type"), "value", found.get("peft_type"))
        if kind != "LORA":
            raise UserError(f"peft_type must be 'LORA', got {kind!r}. Only LoRA and DoRA are supported.")
        known = {f.name for f in fields(cls)}
        values = {name: value for name, value in found.items() if name in known and value is not None}
        for name, value in values.items():
            if isinstance(value, (set, frozenset)):
                values[name] = sorted(value)
        if "task_type" in values:
            values["task_type"] = getattr(values["task_type"], "value", values["task_type"])
        return cls(**values)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise UserError(f"{name} must be a dictionary, got {getattr(self, name)!r}.")
        for r in (self.r, *self.rank_pattern.values()):
            if type(r) is not int or not 0 < r < 1 << 16:
                raise UserError(f"r must be an integer from 1 to {(1 << 16) - 1}, got {r!r}.")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if type(alpha) not in (int, float) or not math.isfinite(alpha):
                raise UserError(f"lora_alpha must be a finite number, got {alpha!r}.")
        if type(self.lora_dropout) not in (int, float) or not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}.")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            if not isinstance(getattr(self, name), str):
                _check_names(name, getattr(self, name) or ())
        _check_names("modules_to_save", self.modules_to_save or ())
        check_choice("bias", self.bias, BIASES)
        if self.init_lora_weights not in INITIALIZATIONS:
            raise UserError(f"init_lora_weights must be True, False or 'gaussian', got {self.init_lora_weights!r}.")
        if not all(type(number) is int for number in self.layer_numbers):
            raise UserError(f"layers_to_transform must be layer numbers, got {self.layers_to_transform!r}.")
        if self.layer_numbers and isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            raise UserError("layers_to_transform needs a list of target_modules, not a regular expression.")
        if self.layers_pattern and not self.layer_numbers:
            raise UserError("layers_pattern needs layers_to_transform.")
        whole_names = [name for name in (self.target_modules, self.exclude_modules) if isinstance(name, str)]
        for pattern in (*whole_names, *self.rank_pattern, *self.alpha_pattern, *self.layer_lists):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{pattern!r} is not a regular expression ({error}).") from error

    @property
    def layer_numbers(self) -> Sequence[int]:
        """The numbers in `layers_to_transform`; empty for all layers."""
        numbers = self.layers_to_transform
        return [numbers] if isinstance(numbers, int) else numbers or []

    @property
    def layer_lists(self) -> Sequence[str]:
        """The names in `layers_pattern`; empty for any."""
        return [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []

    @property
    def trained_modules(self) -> list[str]:
        """`modules_to_save` and the heads that PEFT adds to them."""
        heads = CLASSIFICATION_HEADS if self.task_type in CLASSIFICATION_TASKS else ()
        return list(dict.fromkeys((*(self.modules_to_save or ()), *heads)))

    def targets(self, name: str) -> bool:
        """Return whether `target_modules` names the module of this name. See `excludes` for the other fields."""
        return _names(self.target_modules, name)

    def excludes(self, name: str) -> bool:
        """Return whether a module that `target_modules` names stays as it is."""
        if self.exclude_modules and _names(self.exclude_modules, name):
            return True
        if not self.layer_numbers:
            return False
        lists = self.layer_lists or [r"[^.]*"]
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in lists)
        number = next((int(match[1]) for match in found if match), None)
        return number not in self.layer_numbers

    def rank(self, name: str) -> int:
        """Return the rank for the module of this name."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def scaling(self, name: str) -> float:
        """Return the factor of B · A for the module of this name."""
        r = self.rank(name)
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r)


def read_adapter_config(path: str | os.PathLike[str]) -> LoraConfig:
    """Return the configuration stored in an `adapter_config.json`.

    Raises:
        CheckpointError: the file is damaged, describes neither LoRA nor DoRA, or sets something that is not supported
            and changes what the adapter computes.
    """
    found = json_object(path)
    initialization = found.pop("init_lora_weights", None)  # matters only for new adapters, unless it changes the base
    if str(initialization).startswith(CHANGES_BASE):
        raise CheckpointError(
            f"{path}: the adapter was initialized by {initialization!r}, which changes the base model. Convert it to "
            "plain LoRA in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    if unknown := sorted(found.keys() - {f.name for f in fields(LoraConfig)} - IGNORED_FIELDS):
        logger.warning("%s: unknown fields are ignored: %s.", path, ", ".join(unknown))
    try:
        return LoraConfig.from_fields(found)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the fields of an adapter's JSON file.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Download it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must contain a JSON object, got {type(found).__name__}. Download it again.")
    return found


def has_suffix(name: str, suffixes: Sequence[str]) -> bool:
    """Return whether a module's name, such as "layer.0.query", ends with one of these, in whole parts between dots."""
    return any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)


def _names(names: Sequence[str] | str, name: str) -> bool:
    """Return whether a list of name suffixes, or a regular expression for whole names, fits a module's name."""
    return re.fullmatch(names, name) is not None if isinstance(names, str) else has_suffix(name, names)


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _check_names(argument: str, names: Any) -> None:
    if (
        isinstance(names, str)
        or not isinstance(names, Sequence)
        or not all(isinstance(name, str) and name for name in names)
    ):
        raise UserError(f"{argument} must be a list of module names, got {names!r}.")
