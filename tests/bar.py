"""The bar that results are held to: how far they may be from the exact ones, given how far torch's are.

The error against float64 is at most 3 times that of torch in the same precision, plus a floor, a small part of the
output's scale (its largest absolute value). It holds for the largest error and for the root mean square.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

RATIO = 3
FLOORS = {"float32": 1e-6, "float16": 2**-11, "bfloat16": 2**-8}  # in half precision that of rounding the result
MEASURES = {"max": lambda x: np.abs(x).max(initial=0), "rms": lambda x: np.sqrt((x * x).sum() / max(1, x.size))}


class Errors(NamedTuple):
    """Those of ours and of torch, by one measure, and what is allowed."""

    measure: str
    ours: float
    torch: float
    allowed: float
    scale: float


def hold_to_bar(
    ours: Any,
    theirs: Any,
    float64: Any,
    label: str = "",
    scale: float = 0.0,
    ratio: float = RATIO,
    floor: float = FLOORS["float32"],
) -> list[Errors]:
    """The errors by each measure, none of which may be larger than allowed. The arrays are of one shape.

    Args:
        scale: the output's is its own, unless a larger one is given.
        floor: what is allowed besides, over the scale.
    """
    ours, theirs, float64 = (np.asarray(x, dtype=np.float64) for x in (ours, theirs, float64))
    assert ours.shape == theirs.shape == float64.shape, label
    assert np.isfinite(float64).all() and np.isfinite(ours).all(), label
    scale = max(scale, np.abs(float64).max(initial=0))
    found = []
    for measure, size in MEASURES.items():
        error, torch_error = size(ours - float64), size(theirs - float64)
        allowed = ratio * torch_error + floor * scale
        assert error <= allowed, (
            f"{label}: {measure} error {error:.3g}, allowed {allowed:.3g} (torch {torch_error:.3g}, scale {scale:.3g})"
        )
        found.append(Errors(measure, error, torch_error, allowed, scale))
    return found
