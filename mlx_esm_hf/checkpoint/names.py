"""Key dialects: how other programs name the parameters of a model, as tables of renames that are read both ways.

The canonical names are the parameter names of the models here. The tables of a family stand in its own folder,
`models/<family>/names.py`; this file knows how to read them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# What a placeholder of a template stands for. The number of a layer is an asterisk in files of transformers 5.
PLACEHOLDERS = {"layer": r"\d+|\*", "module": r"(?:.*\.)?"}


@dataclass(frozen=True)
class Dialect:
    """The names that another program has for a model's parameters.

    Args:
        renames: pairs (theirs, ours) of names, such as ("layers.{layer}.fc1.{rest}", "layer.{layer}.dense.{rest}").
            `{layer}` stands for a number, `{module}` for the beginning of a name up to a dot, any other placeholder for
            whatever there is. Where only their name has a `{layer}`, each of the layers has the same array. Names are
            those of the base model, without the prefix that a model with a head gives them.
        ignored: their names that nothing here reads, unless the model has a parameter of this name.
        prefixed: whether they, too, put a prefix before the names of the base model.
    """

    renames: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...] = ()
    prefixed: bool = True

    def ours(self, key: str) -> str | None:
        """Our name for their key, neither with a prefix; None if the table does not have it."""
        for theirs, ours in self.renames:
            if match := _pattern(theirs).fullmatch(key):
                return ours.format(**match.groupdict())
        return None

    def theirs(self, name: str, num_layers: int) -> list[str]:
        """Their keys for our name, neither with a prefix: one, or one for each layer."""
        for theirs, ours in self.renames:
            if match := _pattern(ours).fullmatch(name):
                found = match.groupdict()
                if "{layer}" in theirs and "layer" not in found:
                    return [theirs.format(layer=layer, **found) for layer in range(num_layers)]
                return [theirs.format(**found)]
        return [name]


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)  # text and placeholders by turns
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
    """{key of a checkpoint: canonical name} for a model whose parameters are `expected`.

    Keys that nothing reads are left out; a key that the model does not know keeps its name. Of several keys for one
    parameter the first counts, in the order of the alphabet.

    Args:
        prefix: what a model with a head puts before the names of its base model, such as "model".
        dialects: those to understand.
        tied: {parameter: the one it is where they are tied}; a tied parameter's key stands for the other's.
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
    """The parameter that a key is for, with the prefix or without it, as the model has it; None, nothing reads it."""
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
    """A canonical state dict under the names of a dialect."""
    named: dict[str, T] = {}
    for name, value in state.items():
        bare = name.removeprefix(f"{prefix}.")
        kept = f"{prefix}." if dialect.prefixed and bare != name else ""
        named |= {kept + key: value for key in dialect.theirs(bare, num_layers)}
    return named
