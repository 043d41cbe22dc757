"""The device that MLX computes on by default."""

from __future__ import annotations

import mlx.core as mx

from mlx_esm_hf.errors import UserError


def use_device(device: str | None) -> None:
    """Compute on "cpu" or "gpu" from now on; None, on MLX's own choice.

    Raises:
        ValueError: another word, or there is no GPU.
    """
    if device is None:
        return
    if device not in ("cpu", "gpu"):
        raise UserError(f"device={device!r} is not one of cpu, gpu.")
    if device == "gpu" and not mx.is_available(mx.gpu):
        raise UserError("device='gpu': MLX has no GPU here. Leave it out, or take 'cpu'.")
    mx.set_default_device(mx.Device(getattr(mx, device)))
