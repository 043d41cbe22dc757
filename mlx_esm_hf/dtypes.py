"""Dtypes: which names are understood, what a checkpoint is loaded as, and which casts are possible."""

from __future__ import annotations

import functools
import logging
from typing import Any

import mlx.core as mx

from mlx_esm_hf.checks import suggestion
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runtime.device import half_precision_is_slow

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": mx.float32,
    "float": mx.float32,
    "float16": mx.float16,
    "half": mx.float16,
    "bfloat16": mx.bfloat16,
    "float64": mx.float64,
    "double": mx.float64,
}
# Dtypes in which `convert` can store weights.
STORED_DTYPES = ("float32", "float16", "bfloat16")


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time this message is passed."""
    logger.warning(message)


def as_dtype(dtype: Any) -> mx.Dtype | None:
    """Return the `mx.Dtype` named by a string, an `mx.Dtype` or torch's object; None if it names no dtype."""
    return DTYPES.get(str(dtype).rpartition(".")[2])


def check_dtype(requested: Any) -> mx.Dtype | None:
    """Return the `mx.Dtype` that the caller requests; None for "auto".

    Raises:
        ValueError: it names no dtype.
    """
    if requested != "auto" and as_dtype(requested) is None:
        raise UserError(
            f"dtype must be one of {', '.join(DTYPES)}, 'auto', or their objects; got {requested!r}."
            f"{suggestion(requested, DTYPES)}"
        )
    return as_dtype(requested)


def name_of(dtype: mx.Dtype) -> str:
    """Return a dtype's name as configs spell it, such as "float32"."""
    return str(dtype).rpartition(".")[2]


def resolve_dtype(requested: Any, configured: Any, stored: list[mx.Dtype]) -> mx.Dtype:
    """Return the dtype to load a checkpoint in.

    Args:
        requested: what the caller passed to `from_pretrained`; None and "auto" leave the choice to the checkpoint.
        configured: the dtype in the checkpoint's config, or None.
        stored: dtypes of the checkpoint's floating-point arrays.

    Raises:
        ValueError: `requested` names no dtype.
    """
    if requested is not None and (dtype := check_dtype(requested)) is not None:
        return dtype
    dtype = as_dtype(configured) or (stored[0] if stored else mx.float32)
    if dtype in (mx.float16, mx.bfloat16) and half_precision_is_slow():
        warn_once(
            "The checkpoint is in half precision, which is slower on the CPU, so it is loaded as float32 (except for "
            "quantized weights). Pass dtype= to keep half precision and use half the memory."
        )
        return mx.float32
    return dtype


def cast_error(found: mx.Dtype, expected: mx.Dtype) -> str:
    """Return why an array of dtype `found` cannot become a parameter of dtype `expected`; "" if it can be cast.

    Integer arrays are quantized weights and are never cast.
    """
    if mx.issubdtype(expected, mx.floating):
        if not mx.issubdtype(found, mx.floating):
            return f"has integer dtype {found}, expected a floating-point dtype"
    elif found != expected:
        return f"has dtype {found}, expected {expected} (a quantized weight)"
    return ""
