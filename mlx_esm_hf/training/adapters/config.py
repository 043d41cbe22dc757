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

from mlx_esm_hf.errors import CheckpointError, UserError

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"  # a `target_modules` of PEFT: every linear layer except the output projection

# For these tasks, PEFT trains and saves these heads in addition to `modules_to_save`.
CLASSIFICATION_TASKS = ("SEQ_CLS", "TOKEN_CLS")
CLASSIFICATION_HEADS = ("classifier", "score")

# Fields of PEFT's adapter_config.json, up to version 0.21.
# These change what an adapter computes, so a file that sets one of them is refused:
REFUSED = {
    "alora_invocation_tokens", "arrow_config", "exclude_modules", "fan_in_fan_out", "kasa_config", "layer_replication",
    "layers_to_transform", "lora_bias", "megatron_config", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
}  # fmt: skip
# These describe the origin and initialization of an adapter, or belong to a refused field:
IGNORED_FIELDS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "init_lora_weights", "layers_pattern", "loftq_config", "lora_ga_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
# Values of `init_lora_weights` that change the weights of the base model.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraConfig:
    """What adapters look like and where they go: the supported fields of PEFT's `LoraConfig`.

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
        bias: must be "none": biases are not trained.
        task_type: PEFT's name of the task, written into the file.

    Raises:
        ValueError: a value is invalid.
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

    def __post_init__(self) -> None:
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
        if not isinstance(self.target_modules, str):
            _check_names("target_modules", self.target_modules)
        _check_names("modules_to_save", self.modules_to_save or ())
        if self.bias != "none":
            raise UserError(f"bias must be 'none', got {self.bias!r}: training biases is not supported.")
        whole_names = [self.target_modules] if isinstance(self.target_modules, str) else []
        for pattern in (*whole_names, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{pattern!r} is not a regular expression ({error}).") from error

    @property
    def trained_modules(self) -> list[str]:
        """`modules_to_save` and the heads that PEFT adds to them."""
        heads = CLASSIFICATION_HEADS if self.task_type in CLASSIFICATION_TASKS else ()
        return list(dict.fromkeys((*(self.modules_to_save or ()), *heads)))

    def targets(self, name: str) -> bool:
        """Return whether the module of this name gets an adapter."""
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        return has_suffix(name, self.target_modules)

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
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Download it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must contain a JSON object, got {type(found).__name__}. Download it again.")
    if found.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type must be 'LORA', got {found.get('peft_type')!r}. Only LoRA and DoRA are supported."
        )
    for name in sorted(REFUSED & found.keys()):
        if found[name] not in (None, False, [], {}):
            raise CheckpointError(
                f"{path} sets {name}={found[name]!r}, which is not supported and changes what the adapter computes."
            )
    if str(found.get("init_lora_weights")).startswith(CHANGES_BASE):
        raise CheckpointError(
            f"{path}: the adapter was initialized by {found['init_lora_weights']!r}, which changes the base model. "
            "Convert it to plain LoRA in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    supported = {f.name for f in fields(LoraConfig)}
    if unknown := sorted(found.keys() - supported - REFUSED - IGNORED_FIELDS):
        logger.warning("%s: unknown fields are ignored: %s.", path, ", ".join(unknown))
    try:
        return LoraConfig(**{name: found[name] for name in supported & found.keys() if found[name] is not None})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def has_suffix(name: str, suffixes: Sequence[str]) -> bool:
    """Return whether a module's name, such as "layer.0.query", ends with one of these, in whole parts between dots."""
    return any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)


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
