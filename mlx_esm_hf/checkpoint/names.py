"""Key dialects: the names that other programs have for a model's parameters, as rename tables that work both ways.

The canonical names are the parameter names of the models in this package. The tables of a family are in
`models/<family>/names.py`; this module applies them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# What the placeholders match. Files of transformers 5 can have an asterisk for the number of a layer.
PLACEHOLDERS = {"layer": r"\d+|\*", "module": r"(?:.*\.)?"}


@dataclass(frozen=True)
class Dialect:
    """The names that another program has for a model's parameters.

    Names are those of the base model, without the prefix that a model with a head adds.

    Args:
        renames: pairs (theirs, ours), such as ("layers.{layer}.fc1.{rest}", "layer.{layer}.dense.{rest}"). `{layer}`
            matches a number, `{module}` a prefix that ends in a dot or is empty, any other placeholder any text. If
            only their name has a `{layer}`, all layers share one array.
        ignored: their names that are not read, unless the model has a parameter of that name.
        prefixed: whether they also add a prefix to the names of the base model.
    """

    renames: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...] = ()
    prefixed: bool = True

    def ours(self, key: str) -> str | None:
        """Return our name for their key, both without prefix; None if the table does not contain the key."""
        for theirs, ours in self.renames:
            if match := _pattern(theirs).fullmatch(key):
                return ours.format(**match.groupdict())
        return None

    def theirs(self, name: str, num_layers: int) -> list[str]:
        """Return their keys for our name, both without prefix: one key, or one per layer."""
        for theirs, ours in self.renames:
            if match := _pattern(ours).fullmatch(name):
                found = match.groupdict()
                if "{layer}" in theirs and "layer" not in found:
                    return [theirs.format(layer=layer, **found) for layer in range(num_layers)]
                return [theirs.format(**found)]
        return [name]


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    """Return a regular expression with a named group for each placeholder."""
    pieces = re.split(r"\{(\w+)\}", template)  # text and placeholders alternate
    for i, piece in enumerate(pieces):
        pieces[i] = f"(?P<{piece}>{PLACEHOLDERS.get(piece, '.*')})" if i % 2 else re.escape(piece)
    return re.compile("".join(pieces))


def canonical_names(
    keys: Iterable[str],
    expected: Collection[str],
    prefix: str,
    dialects: Iterable[Dialect],
    tied: Mapping[str, str],
) -> dict[str, str]:
    """Return {key of a checkpoint: canonical name} for a model.

    Ignored keys are left out. A key that the model does not know keeps its name. If several keys mean one parameter,
    the alphabetically first is used.

    Args:
        keys: the keys of the checkpoint.
        expected: the names of the model's parameters.
        prefix: what a model with a head adds before the names of its base model, such as "model".
        dialects: the dialects to understand.
        tied: {name of a tied parameter: name of the parameter that holds its array}.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for key in sorted(keys):
        name = _canonical_name(key, expected, prefix, dialects)
        if name is not None and name not in expected:
            name = tied.get(name, name)
        if name is not None and name not in taken:
            taken.add(name)
            names[key] = name
    return names


def _canonical_name(key: str, expected: Collection[str], prefix: str, dialects: Iterable[Dialect]) -> str | None:
    """Return the model's name for a key, with or without prefix as the model has it; None if the key is ignored."""
    bare, ignored = key.removeprefix(f"{prefix}."), False
    for dialect in dialects:
        ignored = ignored or bare in dialect.ignored
        if (ours := dialect.ours(bare)) is not None:
            bare = ours
            break
    for name in (bare, f"{prefix}.{bare}"):
        if name in expected:
            return name
    if ignored:
        return None
    return f"{prefix}.{bare}" if key.startswith(f"{prefix}.") else bare


def names_in(dialect: Dialect, state: Mapping[str, T], num_layers: int, prefix: str) -> dict[str, T]:
    """Return a canonical state dict with the names of a dialect.

    Args:
        dialect: the dialect to write.
        state: {canonical name: value}.
        num_layers: number of layers of the model.
        prefix: what a model with a head adds before the names of its base model.
    """
    named: dict[str, T] = {}
    for name, value in state.items():
        bare = name.removeprefix(f"{prefix}.")
        kept = f"{prefix}." if dialect.prefixed and bare != name else ""
        named |= {kept + key: value for key in dialect.theirs(bare, num_layers)}
    return named
