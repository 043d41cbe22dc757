"""Optimizers under the names that transformers has for them, and their options."""

from __future__ import annotations

from typing import Any

from mlx_esm_hf.checks import suggestion
from mlx_esm_hf.errors import UserError

# Names of each kind. Those with "8bit" or "4bit" compress the moments, and are computed in 32 bits.
NAMES = {
    "adamw": (
        "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused", "adamw_hf",
        "adamw_torch_4bit", "adamw_torch_8bit", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit",
        "paged_adamw_8bit",
    ),
    "sgd": ("sgd",),
    "adagrad": ("adagrad",),
    "rmsprop": ("rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
    "adafactor": ("adafactor",),
    "lion": ("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
}  # fmt: skip

# Options in `optim_args`. AdamW and Lion take theirs from other arguments.
OPTIONS = {
    "sgd": {"momentum": float, "dampening": float, "nesterov": bool},
    "adagrad": {"eps": float},
    "rmsprop": {"alpha": float, "eps": float},
    "adafactor": {"clip_threshold": float, "decay_rate": float, "scale_parameter": bool},
}


def kind_of(optim: str) -> str:
    """Return the kind of the optimizer that transformers has this name for, such as "adamw" for "adamw_torch".

    Raises:
        UserError: MLX has no such optimizer.
    """
    for kind, names in NAMES.items():
        if optim in names:
            return kind
    known = [name for names in NAMES.values() for name in names]
    raise UserError(
        f"optim must be one of {', '.join(known)}, got {optim!r}.{suggestion(optim, known)} Pass another optimizer of "
        "mlx.optimizers as MLXTrainer(optimizers=(optimizer, None))."
    )


def options_of(kind: str, text: str | None) -> dict[str, Any]:
    """Return the options in `optim_args`, such as "momentum=0.9, nesterov=true", by name.

    Raises:
        UserError: the text is malformed, or the optimizer does not have such an option.
    """
    known, options = OPTIONS.get(kind, {}), dict[str, Any]()
    for part in (text or "").replace(" ", "").split(","):
        name, _, value = part.partition("=")
        if not part:
            continue
        if name not in known:
            raise UserError(
                f"optim_args: {kind} has no option {name!r}; it has {', '.join(known) or 'none'}."
                f"{suggestion(name, known)}"
            )
        options[name] = _flag(name, value) if known[name] is bool else _number(name, value)
    return options


def _flag(name: str, value: str) -> bool:
    if value.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise UserError(f"optim_args: {name} must be true or false, got {value!r}.")
    return value.lower() in ("true", "yes", "1")


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UserError(f"optim_args: {name} must be a number, got {value!r}.") from None
