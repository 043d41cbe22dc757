"""Low-rank adapters, LoRA (Hu et al. 2021, arXiv:2106.09685) and DoRA (Liu et al. 2024, arXiv:2402.09353), with
the names of PEFT and in its files.

    >>> add_adapters(model, LoraConfig(r=8, target_modules=["query", "key", "value"], modules_to_save=["classifier"]))
    >>> ...                              # train it: only the adapters, and the classifier, are trainable
    >>> save_adapter(model, "adapter")   # PEFT's `PeftModel.from_pretrained(base, "adapter")` loads it, too
    >>> merge_adapters(model)            # an ordinary model again, as fast as before
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from transformers.utils.hub import resolve_revision

from mlx_esm_hf import ops
from mlx_esm_hf.checkpoint.names import canonical_names, names_in
from mlx_esm_hf.checkpoint.read import load_file
from mlx_esm_hf.checkpoint.resolve import find_file
from mlx_esm_hf.checkpoint.write import write_safetensors
from mlx_esm_hf.errors import CheckpointError, UserError
from mlx_esm_hf.modeling_layers import Linear, QuantizedLinear, dequantized_weight
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.runtime.files import replace_files

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TORCH_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."  # of all keys in PEFT's files

ALL_LINEAR = "all-linear"  # PEFT's word for a `target_modules` of every linear layer but the output projection

# Heads that PEFT trains and saves whole where the task is a classification, without being asked.
CLASSIFICATION_TASKS = ("SEQ_CLS", "TOKEN_CLS")
CLASSIFICATION_HEADS = ("classifier", "score")

# Fields of PEFT's adapter_config.json, up to 0.21. Those that change what an adapter computes, unless they are off:
REFUSED = {
    "alora_invocation_tokens", "arrow_config", "exclude_modules", "fan_in_fan_out", "kasa_config", "layer_replication",
    "layers_to_transform", "lora_bias", "megatron_config", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
}  # fmt: skip
# And those that tell where it comes from and how it was drawn, or belong to one of the others:
IGNORED_FIELDS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "init_lora_weights", "layers_pattern", "loftq_config", "lora_ga_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
# Initialisations after which the base model is another one than the one that was loaded.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraConfig:
    """What adapters look like and where they go; PEFT's `LoraConfig`, as far as it is supported.

    Args:
        r: the rank of the product B · A that is added to a weight.
        lora_alpha: the product counts `lora_alpha / r` times, with `use_rslora` `lora_alpha / √r` times.
        lora_dropout: the share of the input that the adapter does not see in training.
        target_modules: the layers to adapt: endings of their names, a regular expression for whole names, or
            "all-linear" for all but the projection to the vocabulary. The default is what PEFT takes for BERT; it has
            none for ESM.
        modules_to_save: endings of the names of modules to train and save as they are, such as "classifier". Where
            `task_type` is "SEQ_CLS" or "TOKEN_CLS", "classifier" and "score" are among them, as in PEFT.
        use_dora: learn the length of each row of the weight besides its direction.
        rank_pattern, alpha_pattern: {ending of a name, or a regular expression for it: another r or lora_alpha}.
        bias: "none", the biases stay as they are.
        task_type: PEFT's name of the task, for those who load the adapter there.

    Raises:
        ValueError: a value that no adapter can have.
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
                raise UserError(f"{name}={getattr(self, name)!r} is not a dictionary.")
        for r in (self.r, *self.rank_pattern.values()):
            if type(r) is not int or not 0 < r < 1 << 16:
                raise UserError(f"r={r!r} is no rank: a whole number from 1 on.")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if type(alpha) not in (int, float) or not math.isfinite(alpha):
                raise UserError(f"lora_alpha={alpha!r} is not a number.")
        if type(self.lora_dropout) not in (int, float) or not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout={self.lora_dropout!r} is no share: at least 0 and less than 1.")
        if not isinstance(self.target_modules, str):
            _check_names("target_modules", self.target_modules)
        _check_names("modules_to_save", self.modules_to_save or ())
        if self.bias != "none":
            raise UserError(f"bias={self.bias!r} is not supported: only 'none', the biases stay as they are.")
        whole_names = [self.target_modules] if isinstance(self.target_modules, str) else []
        for pattern in (*whole_names, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{pattern!r} is not a regular expression ({error}).") from error

    @property
    def trained_modules(self) -> list[str]:
        """`modules_to_save`, with the heads that PEFT adds to them."""
        heads = CLASSIFICATION_HEADS if self.task_type in CLASSIFICATION_TASKS else ()
        return list(dict.fromkeys((*(self.modules_to_save or ()), *heads)))

    def targets(self, name: str) -> bool:
        """Whether the module of this name is to be adapted."""
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        return ends_with(name, self.target_modules)

    def rank(self, name: str) -> int:
        """The rank in the module of this name."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def scaling(self, name: str) -> float:
        """How often B · A counts in the module of this name."""
        r = self.rank(name)
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r)


def ends_with(name: str, endings: Sequence[str]) -> bool:
    """Whether a module's name, such as "layer.0.query", ends with one of these, cut at the dots."""
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


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
        raise UserError(f"{argument}={names!r} are not names of modules.")


class LoRALinear(nn.Module):
    """A linear layer, plain or quantized, and its adapter, [..., inputs] to [..., outputs].

    LoRA: x · (W + s B A)ᵀ + bias. DoRA: each row of W + s B A gets the length that `lora_magnitude_vector` says. As in
    the paper (section 4.3) and in PEFT, the length that it had before counts as a constant in the gradient.

    The layer takes what a `Linear` takes, and the sums go into the products as their residuals.

    Args:
        base_layer: a `Linear` or `QuantizedLinear`.
        config: of the adapters.
        name: of the layer, for the patterns in `config`.
    """

    not_saved = (
        "has an adapter, whose parameters have no place in a checkpoint of the model: save the adapter alone "
        "(save_adapter), or merge it into the model first (merge_adapters)"
    )

    def __init__(self, base_layer: Linear | QuantizedLinear, config: LoraConfig, name: str = ""):
        super().__init__()
        self.config = config
        self.scaling = config.scaling(name)
        self.base_layer = base_layer
        outputs, inputs = dequantized_weight(self.base_layer).shape
        r = config.rank(name)
        self.lora_A = Linear(inputs, r, bias=False)  # MLX's draw is PEFT's: uniform within ±1/√inputs
        self.lora_B = Linear(r, outputs, bias=False)
        self.lora_B.weight = mx.zeros((outputs, r))
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        if config.use_dora:
            self.lora_magnitude_vector = self._row_lengths()

    def __call__(
        self, x: mx.array, activation: str | None = None, residual: mx.array | None = None, output_scale: float = 1.0
    ) -> mx.array:
        if activation is not None:
            return ops.activated(self(x), residual, activation, output_scale)
        seen = self.lora_dropout(x)
        low_rank = self.lora_A(seen.astype(self.lora_A.weight.dtype)) * self.scaling
        if "lora_magnitude_vector" not in self:
            added = self.lora_B(low_rank, residual=residual, output_scale=output_scale).astype(x.dtype)
            return self.base_layer(x, residual=added, output_scale=output_scale)

        bias = self.base_layer.get("bias", 0)
        row_scale = self._row_scale()
        y = self.base_layer(seen, residual=self.lora_B(low_rank).astype(x.dtype))
        y = row_scale * y + (1 - row_scale) * bias
        if self.training and self.config.lora_dropout:  # the layer itself does see what the adapter does not
            y = y + self.base_layer(x - seen) - bias
        return ops.activated(y.astype(x.dtype), residual, None, output_scale)

    @property
    def weight(self) -> mx.array:
        """The weight that layer and adapter make together, [outputs, inputs]."""
        base = dequantized_weight(self.base_layer)
        weight = self._sum() if "lora_magnitude_vector" not in self else self._row_scale()[:, None] * self._sum()
        return weight.astype(base.dtype)

    @property
    def bias(self) -> mx.array | None:
        """[outputs], or None."""
        return self.base_layer.get("bias")

    def adapter(self) -> dict[str, mx.array]:
        """{name: array} of the adapter's parameters, without those of the layer."""
        parameters: Any = tree_flatten(self.parameters())
        return {name: array for name, array in parameters if not name.startswith("base_layer.")}

    def merged(self) -> Linear:
        """One layer that computes the same, frozen; not a quantized one."""
        outputs, inputs = dequantized_weight(self.base_layer).shape
        layer = Linear(inputs, outputs, bias=self.bias is not None)
        layer.weight = self.weight
        if self.bias is not None:
            layer.bias = self.bias
        layer.freeze()
        layer.train(self.training)
        return layer

    def _sum(self) -> mx.array:
        return dequantized_weight(self.base_layer) + self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    def _row_lengths(self) -> mx.array:
        return mx.linalg.norm(self._sum(), axis=1)

    def _row_scale(self) -> mx.array:
        return self.lora_magnitude_vector / mx.stop_gradient(self._row_lengths())


def add_adapters(model: MLXPreTrainedModel, config: LoraConfig) -> MLXPreTrainedModel:
    """Freeze a model, in place, and give it adapters that change nothing yet: B is zero. They are trainable, and so are
    the modules to save. `model.num_parameters(only_trainable=True)` counts them.

    Returns:
        The model.

    Raises:
        ValueError: it has adapters, no module has such a name, or one that has is no linear layer.
    """
    _check_plain(model)
    layers, modules = _choose(model, config)
    _place(model, layers, modules)
    return model


def merge_adapters(model: MLXPreTrainedModel) -> MLXPreTrainedModel:
    """Make an adapted model an ordinary one, in place: `Linear` layers that compute the same, frozen as they were.

    A quantized layer becomes a whole one; quantize the model again (`mlx.nn.quantize`) where it has to be small.

    Returns:
        The model.

    Raises:
        ValueError: it has no adapters.
    """
    layers = _adapted(model)
    while layers:  # one by one, so that there is not a second copy of all weights
        name, layer = layers.popitem()
        merged = layer.merged()
        mx.eval(merged.parameters())
        model.update_modules(tree_unflatten([(name, merged)]))
    return model


def save_adapter(model: MLXPreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Write the adapters, and the modules to save, as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.
    Both appear when they are whole.

    Raises:
        ValueError: the model has no adapters.
        OSError: the folder cannot be written to.
    """
    layers = _adapted(model)
    config = next(iter(layers.values())).config
    modules = _modules_to_save(model, config)
    state = names_in(
        model.dialects[0], _state(layers, modules), model.config.num_hidden_layers, model.base_model_prefix
    )
    written = asdict(config) | {
        "peft_type": "LORA",
        "base_model_name_or_path": model.config._name_or_path or None,
        "modules_to_save": config.trained_modules or None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if not isinstance(config.target_modules, str):
        written["target_modules"] = list(config.target_modules)
    with replace_files(folder) as temporary:
        write_safetensors(temporary / WEIGHTS, {PREFIX + name: array for name, array in state.items()})
        text = json.dumps(written, indent=2, sort_keys=True)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")


def load_adapter(
    model: MLXPreTrainedModel,
    folder_or_repo: str | os.PathLike[str],
    *,
    revision: str = "main",
    subfolder: str = "",
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> MLXPreTrainedModel:
    """Give a model the adapters that `save_adapter`, or PEFT, has written. They are trainable, all else is frozen; a
    model in evaluation mode stays in it.

    Args:
        folder_or_repo: a folder, or an id on the Hub; the other arguments are those of `from_pretrained`.

    Returns:
        The model.

    Raises:
        OSError: no such repository or file, or no network and nothing in the cache.
        CheckpointError: a damaged file, an adapter of another kind or for another model. The model is as it was.
        ValueError: the model has adapters.
    """
    _check_plain(model)
    source = str(folder_or_repo)
    hub: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    hub |= {"revision": resolve_revision(source, revision, **hub), "force_download": force_download}
    config_file = find_file(source, CONFIG, subfolder=subfolder, **hub)
    if config_file is None:
        raise OSError(f"{source} holds no {CONFIG}: there is no adapter to load.")
    files = (find_file(source, name, subfolder=subfolder, **hub) for name in (WEIGHTS, TORCH_WEIGHTS))
    weights = next((file for file in files if file is not None), None)
    if weights is None:
        raise OSError(f"{source} holds neither {WEIGHTS} nor {TORCH_WEIGHTS}: there are no weights to load.")

    config = read_adapter_config(config_file)
    arrays = {key.removeprefix(PREFIX): array for key, array in load_file(weights).items()}
    try:
        layers, modules = _choose(model, config)
    except ValueError as error:
        raise CheckpointError(f"{config_file}: {error}") from error
    _check_fit(model, arrays, _state(layers, modules), weights)
    mx.eval(arrays)
    _place(model, layers, modules)
    model.load_state_dict(arrays, strict=False)
    return model


def read_adapter_config(path: str | os.PathLike[str]) -> LoraConfig:
    """What an `adapter_config.json` says.

    Raises:
        CheckpointError: it is damaged, of another kind than LoRA and DoRA, or sets something that is not supported here
            and changes what the adapter computes.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Download it again.") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = repr(found.get("peft_type")) if isinstance(found, dict) else "no config"
        raise CheckpointError(f"{path} is of {kind}, where adapters here are of peft_type 'LORA' (LoRA and DoRA).")
    for name in sorted(REFUSED & found.keys()):
        if found[name] not in (None, False, [], {}):
            raise CheckpointError(
                f"{path} sets {name}={found[name]!r}, which is not supported here, and without which the adapter would "
                "compute something else."
            )
    if str(found.get("init_lora_weights")).startswith(CHANGES_BASE):
        raise CheckpointError(
            f"{path}: the adapter was drawn by {found['init_lora_weights']!r}, which changes the base model, too. "
            "Convert it to plain LoRA in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    supported = {f.name for f in fields(LoraConfig)}
    if unknown := sorted(found.keys() - supported - REFUSED - IGNORED_FIELDS):
        logger.warning("%s sets %s, which nothing here knows: ignored.", path, ", ".join(unknown))
    try:
        return LoraConfig(**{name: found[name] for name in supported & found.keys() if found[name] is not None})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _find_adapted(model: MLXPreTrainedModel) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def has_adapters(model: MLXPreTrainedModel) -> bool:
    return bool(_find_adapted(model))


def _check_plain(model: MLXPreTrainedModel) -> None:
    if _find_adapted(model):
        raise UserError(f"{type(model).__name__} has adapters: merge them (merge_adapters) before it gets others.")


def _adapted(model: MLXPreTrainedModel) -> dict[str, LoRALinear]:
    if not (layers := _find_adapted(model)):
        raise UserError(f"{type(model).__name__} has no adapters: add_adapters or load_adapter gives it some.")
    return layers


def _peft_names(model: MLXPreTrainedModel) -> dict[str, str]:
    """{name of a module in PEFT's files: its name here}; they differ where the model's dialect says so."""
    weights = {f"{name}.weight": name for name, _ in model.named_modules() if name}
    named = names_in(model.dialects[0], weights, model.config.num_hidden_layers, model.base_model_prefix)
    return {key.removesuffix(".weight"): name for key, name in named.items()}


def _modules_to_save(model: MLXPreTrainedModel, config: LoraConfig) -> dict[str, nn.Module]:
    """{name here: module} of the modules that are trained as they are."""
    chosen = {ours for theirs, ours in _peft_names(model).items() if ends_with(theirs, config.trained_modules)}
    return {name: module for name, module in model.named_modules() if name in chosen}


def _choose(model: MLXPreTrainedModel, config: LoraConfig) -> tuple[dict[str, LoRALinear], dict[str, nn.Module]]:
    """{name: adapted layer} to put into a model, and {name: module} of its modules to save; nothing is changed yet."""
    held = dict(model.named_modules())
    modules = _modules_to_save(model, config)
    if config.trained_modules and not modules:
        names = ", ".join(model.children())
        raise UserError(f"modules_to_save={config.trained_modules}: the model has no such module, but {names}.")
    for name, module in modules.items():
        packed = [inner for inner, part in module.named_modules() if isinstance(part, nn.QuantizedLinear)]
        if packed:
            where = f"{name}.{packed[0]}".rstrip(".")
            raise UserError(f"{where} is quantized and cannot be trained: leave it out of modules_to_save.")

    layers: dict[str, LoRALinear] = {}
    within = tuple(f"{name}." for name in modules)
    for theirs, name in _peft_names(model).items():
        layer = held[name]
        if config.target_modules == ALL_LINEAR:
            wanted = isinstance(layer, Linear | QuantizedLinear) and layer is not model.get_output_embeddings()
        else:
            wanted = config.targets(theirs)
        if not wanted or f"{name}.".startswith(within):
            continue
        if not isinstance(layer, Linear | QuantizedLinear):
            raise UserError(
                f"target_modules name {theirs}, of class {type(layer).__name__}: adapters go on linear layers."
            )
        layers[name] = LoRALinear(layer, config, theirs)
    if not layers:
        linear = [key for key, name in _peft_names(model).items() if isinstance(held[name], Linear | QuantizedLinear)]
        known = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in linear)
        raise UserError(
            f"target_modules={config.target_modules!r} name no linear layer of {type(model).__name__}. It has, with N "
            f"for a number: {', '.join(known)}."
        )
    return layers, modules


def _place(model: MLXPreTrainedModel, layers: Mapping[str, LoRALinear], modules: Mapping[str, nn.Module]) -> None:
    model.freeze()
    for layer in layers.values():
        layer.train(model.training)
    model.update_modules(tree_unflatten(list(layers.items())))
    for module in modules.values():
        module.unfreeze()


def _state(layers: Mapping[str, LoRALinear], modules: Mapping[str, nn.Module]) -> dict[str, mx.array]:
    """{name: array} of all that an adapter's file holds."""
    state = {f"{name}.{key}": array for name, layer in layers.items() for key, array in layer.adapter().items()}
    for name, module in modules.items():
        parameters: Any = tree_flatten(module.parameters())
        state |= {f"{name}.{key}": array for key, array in parameters}
    return state


def _check_fit(
    model: MLXPreTrainedModel, arrays: Mapping[str, mx.array], expected: Mapping[str, mx.array], path: str
) -> None:
    """Refuse the arrays of a file that are not those of the adapter that its config describes."""
    names = canonical_names(arrays, expected, model.base_model_prefix, model.dialects, {})
    if missing := sorted(expected.keys() - names.values()):
        raise CheckpointError(
            f"{path} lacks {len(missing)} of the adapter's arrays, {missing[0]!r} among them. It is not whole, or its "
            f"{CONFIG} belongs to another one, or it was made for another model than {type(model).__name__}."
        )
    for key, name in names.items():
        if name in model.tied_weights() and name not in expected:
            raise CheckpointError(
                f"{path} holds {key!r}, a copy of the embedding that was trained by itself, and the model has one for "
                "both: load it with tie_word_embeddings=False."
            )
        if name not in expected:
            raise CheckpointError(
                f"{path} holds {key!r}, which is neither of the adapter that its {CONFIG} describes nor of its "
                f"modules_to_save. It was made for another model than {type(model).__name__}, or by other settings."
            )
        if arrays[key].shape != expected[name].shape or not mx.issubdtype(arrays[key].dtype, mx.floating):
            raise CheckpointError(
                f"{path}: {key!r} is {arrays[key].dtype} of shape {arrays[key].shape}, where "
                f"{type(model).__name__} needs floating numbers of shape {expected[name].shape}."
            )
