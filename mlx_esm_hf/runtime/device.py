"""The device that MLX computes on by default."""

from __future__ import annotations

import mlx.core as mx

from mlx_esm_hf.checks import check_choice
from mlx_esm_hf.errors import UserError

DEVICES = ("cpu", "gpu")
TORCH_GPUS = ("gpu", "cuda", "mps")  # what torch users call a GPU


def device_name() -> str:
    """Return the kind of MLX's default device, "cpu" or "gpu"."""
    return mx.default_device().type.name


def half_precision_is_slow() -> bool:
    """Return whether the default device computes in float16 and bfloat16 more slowly than in float32."""
    return mx.default_device() == mx.cpu


def use_device(device: str | None) -> None:
    """Make "cpu" or "gpu" MLX's default device. None keeps MLX's own choice.

    Raises:
        ValueError: `device` is another word, or MLX has no GPU here.
    """
    if device is None:
        return
    check_choice("device", device, DEVICES)
    use_torch_device(device)


def use_torch_device(device: int | str) -> None:
    """Make a device MLX's default, by the name that torch and transformers have for it.

    Args:
        device: "cpu" or -1; "gpu", "cuda", "mps" or the number of a GPU.

    Raises:
        ValueError: no device is called so, or MLX has no GPU here.
    """
    name = str(device).partition(":")[0]
    if name in ("cpu", "-1"):
        mx.set_default_device(mx.Device(mx.cpu))
        return
    if name not in TORCH_GPUS and not name.isdecimal():
        raise UserError(f"device={device!r} is not one of cpu, -1, {', '.join(TORCH_GPUS)} or a number.")
    if not mx.is_available(mx.gpu):
        raise UserError(f"device={device!r}: MLX has no GPU here. Leave the argument out, or pass 'cpu'.")
    mx.set_default_device(mx.Device(mx.gpu, int(name) if name.isdecimal() else 0))
