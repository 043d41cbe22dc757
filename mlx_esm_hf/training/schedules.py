"""Learning rate schedules, as factors of the learning rate.

Source: `transformers.optimization`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from mlx_esm_hf.checks import check_choice, suggestion
from mlx_esm_hf.errors import UserError

Schedule = Callable[[int], float]


def constant(peak: float, warmup: int, steps: int) -> Schedule:
    """Return a factor of 1 for all steps, without a warm-up."""
    return lambda step: 1.0


def constant_with_warmup(peak: float, warmup: int, steps: int) -> Schedule:
    """Return a factor that rises from 0 to 1 and stays there."""
    return _with_warmup(lambda step: 1.0, warmup)


def linear(peak: float, warmup: int, steps: int) -> Schedule:
    """Return a factor that falls linearly from 1 to 0 after the warm-up."""
    return _with_warmup(lambda step: max(0.0, 1 - _progress(step, warmup, steps)), warmup)


def cosine(peak: float, warmup: int, steps: int, num_cycles: float = 0.5) -> Schedule:
    """Return a factor that follows `num_cycles` waves of a cosine after the warm-up."""
    return _with_warmup(lambda step: max(0.0, _wave(_progress(step, warmup, steps), num_cycles)), warmup)


def cosine_with_restarts(peak: float, warmup: int, steps: int, num_cycles: int = 1) -> Schedule:
    """Return a factor that falls from 1 to 0 along a cosine `num_cycles` times."""

    def factor(step: int) -> float:
        progress = _progress(step, warmup, steps)
        return 0.0 if progress >= 1 else _wave(num_cycles * progress % 1.0, 0.5)

    return _with_warmup(factor, warmup)


def polynomial(peak: float, warmup: int, steps: int, lr_end: float = 1e-7, power: float = 1.0) -> Schedule:
    """Return a factor that falls from 1 to `lr_end / peak` as a polynomial of this power."""
    if peak <= lr_end:
        raise UserError(f"lr_scheduler_kwargs: lr_end must be below the learning rate {peak}, got {lr_end}.")
    end = lr_end / peak
    return _with_warmup(lambda step: (1 - end) * (1 - min(1, _progress(step, warmup, steps))) ** power + end, warmup)


def inverse_sqrt(peak: float, warmup: int, steps: int, timescale: int | None = None) -> Schedule:
    """Return a factor that falls with the inverse square root of the step."""
    scale = timescale or warmup or 10_000
    return _with_warmup(lambda step: 1 / math.sqrt((step + scale - warmup) / scale), warmup)


def cosine_with_min_lr(
    peak: float,
    warmup: int,
    steps: int,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> Schedule:
    """Return the factor of `cosine`, which ends at `min_lr`, or at `min_lr_rate` times the learning rate."""
    low = _lowest(peak, min_lr, min_lr_rate)
    return _with_warmup(lambda step: max(0.0, _above(low, _wave(_progress(step, warmup, steps), num_cycles))), warmup)


def cosine_warmup_with_min_lr(
    peak: float,
    warmup: int,
    steps: int,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> Schedule:
    """Return the factor of `cosine_with_min_lr`, one step earlier, with a warm-up that begins at `warmup_lr_rate`."""
    low = _lowest(peak, min_lr, min_lr_rate)

    def factor(step: int) -> float:
        if step >= warmup:
            return max(0.0, _above(low, _wave(_progress(step + 1, warmup, steps), num_cycles)))
        if warmup_lr_rate is None:
            return (step + 1) / warmup
        return _above(warmup_lr_rate, step / max(1, warmup - 1))

    return factor


def warmup_stable_decay(
    peak: float,
    warmup: int,
    steps: int,
    num_decay_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Schedule:
    """Return a factor that rises, stays at 1, and falls to `min_lr_ratio` during the last `num_decay_steps` steps."""
    if num_decay_steps is None:
        raise UserError('lr_scheduler_type="warmup_stable_decay" needs lr_scheduler_kwargs={"num_decay_steps": …}.')
    decay = num_decay_steps
    check_choice("warmup_type", warmup_type, ("linear", "cosine", "1-sqrt"))
    check_choice("decay_type", decay_type, ("linear", "cosine", "1-sqrt"))
    stable_end = steps - decay if num_stable_steps is None else warmup + num_stable_steps

    def factor(step: int) -> float:
        if step < warmup:
            rising = step / warmup
            if warmup_type == "cosine":
                rising = 1 - _wave(rising, 0.5)
            elif warmup_type == "1-sqrt":
                rising = 1 - math.sqrt(1 - rising)
            return max(0.0, _above(min_lr_ratio, rising))
        if step < stable_end:
            return 1.0
        if step >= stable_end + decay:
            return min_lr_ratio
        progress = (step - stable_end) / max(1, decay)
        falling = 1 - progress
        if decay_type == "cosine":
            falling = _wave(progress, num_cycles)
        elif decay_type == "1-sqrt":
            falling = 1 - math.sqrt(progress)
        return max(0.0, _above(min_lr_ratio, falling))

    return factor


SCHEDULES = {
    schedule.__name__: schedule
    for schedule in (
        linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt,
        cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay,
    )
}  # fmt: skip


def schedule(name: str, peak: float, warmup: int, steps: int, **options: Any) -> Schedule:
    """Return the function from a step, counted from 0, to the factor of the learning rate.

    Args:
        name: `lr_scheduler_type` of the arguments.
        peak: the learning rate that the factor 1 stands for.
        warmup: steps of the warm-up.
        steps: steps of the training.
        options: `lr_scheduler_kwargs` of the arguments.

    Raises:
        UserError: the schedule does not have such an option, or needs one that is missing.
    """
    known = list(inspect.signature(SCHEDULES[name]).parameters)[3:]
    for option in options:
        if option not in known:
            raise UserError(
                f"lr_scheduler_kwargs: {name} has no option {option!r}; it has {', '.join(known) or 'none'}."
                f"{suggestion(option, known)}"
            )
    return SCHEDULES[name](peak, warmup, steps, **options)


def _with_warmup(factor: Schedule, warmup: int) -> Schedule:
    """Return a schedule whose first `warmup` steps rise linearly from 0."""
    return lambda step: step / warmup if step < warmup else factor(step)


def _progress(step: int, warmup: int, steps: int) -> float:
    """Return the fraction of the steps after the warm-up that are done."""
    return (step - warmup) / max(1, steps - warmup)


def _wave(progress: float, cycles: float) -> float:
    """Return a cosine between 1 and 0: 1 at the start, 0 after half a cycle."""
    return 0.5 * (1 + math.cos(math.pi * cycles * 2 * progress))


def _above(low: float, factor: float) -> float:
    """Return a factor between 0 and 1 moved to between `low` and 1."""
    return factor * (1 - low) + low


def _lowest(peak: float, min_lr: float | None, min_lr_rate: float | None) -> float:
    """Return the factor at the end of a schedule with a minimum."""
    if (min_lr is None) == (min_lr_rate is None):
        raise UserError("lr_scheduler_kwargs must have min_lr or min_lr_rate, and not both.")
    if min_lr_rate is not None:
        return min_lr_rate
    return min_lr / peak if min_lr and peak else 0.0
