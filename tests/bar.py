"""The error bar of numerical tests: how far a result may be from the exact one, relative to torch's error.

The error against float64 must be at most 3 times torch's error in the same precision, plus a floor, a small fraction of
the output's scale (its largest absolute value). This applies to the largest error and to the root mean square.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

RATIO = 3
FLOORS = {"float32": 1e-6, "float16": 2**-11, "bfloat16": 2**-8}  # in half precision the rounding of the result
MEASURES = {"max": lambda x: np.abs(x).max(initial=0), "rms": lambda x: np.sqrt((x * x).sum() / max(1, x.size))}


class Errors(NamedTuple):
    """Our error, torch's error and the allowed error, by one measure."""

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
    """Assert that our error is within the bar and return the errors by each measure. The arrays have the same shape.

    Args:
        ours: our result.
        theirs: torch's result.
        float64: the exact result.
        label: what is compared, for messages.
        scale: a lower bound for the output's scale.
        ratio: allowed error relative to torch's.
        floor: allowed error relative to the scale, in addition to torch's.
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
