"""Windows over proteins that are too long for a model, and blending their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """A range of positions of one of several sequences, which goes through the model at once."""

    sequence: int  # index of the sequence
    start: int
    stop: int

    @property
    def length(self) -> int:
        """The number of positions."""
        return self.stop - self.start


def cut_windows(sequence: int, length: int, longest: int | None) -> list[Window]:
    """Cut a sequence into windows that overlap by at least half; one window if it is short enough.

    Args:
        sequence: index of the sequence.
        length: its positions.
        longest: maximum positions of a window; None for no limit.
    """
    if longest is None or length <= longest:
        return [Window(sequence, 0, length)]
    step = longest - longest // 2
    count = 1 + -(-(length - longest) // step)
    starts = [round(i * (length - longest) / (count - 1)) for i in range(count)]
    return [Window(sequence, start, start + longest) for start in starts]


def ramp(window: Window, length: int) -> np.ndarray:
    """Return the weight of each position of a window, for blending windows that overlap.

    Weights taper towards the edges of the window, except at the ends of the sequence.

    Args:
        window: the window.
        length: positions of the whole sequence.

    Returns:
        Weights [positions of the window], float32.
    """
    places = np.arange(window.start, window.stop)
    left = np.where(window.start > 0, places - window.start + 1, window.length)
    right = np.where(window.stop < length, window.stop - places, window.length)
    return np.minimum(left, right).astype(np.float32)


def blend(parts: Sequence[tuple[Window, np.ndarray]], length: int) -> np.ndarray:
    """Blend arrays [positions, ...] of windows into one array [length, ...], weighted by `ramp` where they overlap.

    The array of a single window is returned unchanged.
    """
    if len(parts) == 1:
        return parts[0][1]
    shape = (length, *parts[0][1].shape[1:])
    total, weights = np.zeros(shape, np.float32), np.zeros(length, np.float32)
    for window, values in parts:
        weight = ramp(window, length)
        total[window.start : window.stop] += values * weight.reshape(-1, *[1] * (values.ndim - 1))
        weights[window.start : window.stop] += weight
    return total / weights.reshape(-1, *[1] * (total.ndim - 1))
