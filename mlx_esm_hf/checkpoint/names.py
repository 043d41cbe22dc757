"""The key dialects of ESM checkpoints, as one table of renames, read in both directions.

The canonical names are the parameter names of the models here, which are those that transformers 5 has in memory.

- transformers 4.x, and the published repositories: the inverse frequencies once in each layer, `position_ids`,
  sometimes a position table that a rotary model has no use for.
- What `save_pretrained` of transformers 5 writes: `LayerNorm.gamma` and `.beta`, and the inverse frequencies under
  one key with an asterisk for the layer.
- A base model has its keys without the `esm.` that they have in a model with a head.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

T = TypeVar("T")

INV_FREQ = "rotary_embeddings.inv_freq"
LAYER_INV_FREQ = "encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"
TIED = ("lm_head.decoder.weight", "esm.embeddings.word_embeddings.weight")

# pattern -> canonical name; None where nothing reads it. With several keys of one name, the first one counts.
RENAMES: tuple[tuple[re.Pattern[str], str | None], ...] = (
    (re.compile(r"(.*\bLayerNorm)\.gamma"), r"\1.weight"),
    (re.compile(r"(.*\bLayerNorm)\.beta"), r"\1.bias"),
    (re.compile("(esm[.])?" + re.escape(LAYER_INV_FREQ).replace(r"\{\}", r"(?:\d+|\*)")), rf"\g<1>{INV_FREQ}"),
    (re.compile(r"(.*\.)?embeddings\.position_ids"), None),
)


def canonical_names(keys: Collection[str], expected: Collection[str], prefix: str) -> dict[str, str]:
    """{key of a checkpoint: canonical name} for a model whose parameters are `expected`.

    Keys that nothing reads are left out; a key that the model does not know keeps its name. Where a tied head has no
    weight of its own, the head's key stands for the embedding's if that one is absent.

    Args:
        prefix: what a model with a head puts before the names of its base model, such as "esm".
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    tied = TIED[0] not in expected and any(name.startswith("lm_head.") for name in expected)
    for key in sorted(keys):
        name: str | None = key
        for pattern, replacement in RENAMES:
            if match := pattern.fullmatch(key):
                name = replacement and match.expand(replacement)
        if name is None:
            continue
        if tied and name == TIED[0]:
            name = TIED[1]
        if name not in expected:
            if f"{prefix}.{name}" in expected:
                name = f"{prefix}.{name}"
            elif name.removeprefix(f"{prefix}.") in expected:
                name = name.removeprefix(f"{prefix}.")
            elif name.endswith("embeddings.position_embeddings.weight"):
                continue  # of a rotary model; transformers drops it as silently
        if name not in taken:
            taken.add(name)
            names[key] = name
    return names


def published_names(state: Mapping[str, T], num_layers: int) -> dict[str, T]:
    """A canonical state dict under the keys of the published repositories (transformers 4.x)."""
    published: dict[str, T] = {}
    for name, value in state.items():
        if name.endswith(INV_FREQ):
            base = name.removesuffix(INV_FREQ)
            published |= {base + LAYER_INV_FREQ.format(layer): value for layer in range(num_layers)}
        elif name != TIED[0] or value is not state.get(TIED[1]):
            published[name] = value
    return published
