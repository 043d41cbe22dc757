"""Checks of the values that a caller passes: words, integers and numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from mlx_esm_hf.errors import UserError

MOST = (1 << 31) - 1  # default maximum of an integer
MOST_SEED = (1 << 63) - 1
MOST_RANK = (1 << 16) - 1  # of adapters
MOST_LENGTH = 100_000  # residues of a design; the longest known proteins have 45,000
MOST_SAMPLES, MOST_SWEEPS = 1_000_000, 100_000
MOST_RECYCLES, MOST_STEPS = 1000, 10_000  # of folding


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse a value that is not one of some words.

    Raises:
        UserError: the message has the name and the words, and suggests the nearest one.
    """
    known = list(choices)
    if value not in known:
        raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}.{suggestion(value, known)}")


def check_choices(name: str, values: Iterable[Any], choices: Iterable[str]) -> None:
    """Refuse an empty list, or a value in it that is not one of some words.

    Raises:
        UserError: see `check_choice`.
    """
    known, values = list(choices), list(values)
    if not values:
        raise UserError(f"{name} must be any of {', '.join(known)}, got none.")
    if unknown := [value for value in values if value not in known]:
        raise UserError(
            f"{name} must be any of {', '.join(known)}, got {', '.join(map(str, unknown))}."
            f"{suggestion(unknown[0], known)}"
        )


def suggestion(word: Any, known: Iterable[str]) -> str:
    """Return " Did you mean X?" for the word most similar to a misspelt one; "" if none is similar."""
    return "".join(f" Did you mean {one}?" for one in nearest(word, known))


def nearest(word: Any, known: Iterable[str]) -> list[str]:
    """Return the word most similar to a misspelt one, whatever the case; empty if none is similar."""
    folded = {one.casefold(): one for one in known}
    return [folded[found] for found in get_close_matches(str(word).casefold(), folded, n=1)]


def check_integer(name: str, value: Any, low: int, high: int = MOST) -> None:
    """Refuse a value that is not an integer within bounds, both included.

    Raises:
        UserError: the message has the name and the bounds.
    """
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or not low <= int(value) <= high:
        raise UserError(f"{name} must be an integer from {low} to {high}, got {value!r}.")


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Refuse a value that is not a finite number within bounds.

    Args:
        name: name of the value.
        value: the value.
        low: minimum.
        high: maximum.
        above: lower bound, excluded.
        below: upper bound, excluded.

    Raises:
        UserError: the message has the name and the bounds.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not (low <= value <= high and above < value < below):
        bounds = [
            f"{relation} {bound:g}"
            for relation, bound in (("at least", low), ("at most", high), ("above", above), ("below", below))
            if math.isfinite(bound)
        ]
        raise UserError(f"{name} must be a finite number{', ' if bounds else ''}{' and '.join(bounds)}, got {value!r}.")
