"""Repositories made for sentence-transformers: how they make one vector of the states of all tokens."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from mlx_esm_hf.checkpoint.resolve import find_file
from mlx_esm_hf.errors import CheckpointError

# {sentence-transformers' pooling: the pooling here that gives the same vector}
POOLINGS = {"mean": "mean_tokens", "max": "max_tokens", "cls": "cls"}


class SentencePooling(NamedTuple):
    """What follows the transformer in `modules.json`.

    Attributes:
        modes: sentence-transformers' names of the poolings, such as "mean".
        later: names of the modules after the pooling, such as "Normalize".
    """

    modes: list[str]
    later: list[str]

    @property
    def pooling(self) -> str | None:
        """The pooling of `embed` that gives the same vector; None if there is none."""
        return POOLINGS.get(self.modes[0]) if len(self.modes) == 1 else None

    def advice(self, name: str) -> str:
        """Return how to get the vector of a repository with this name."""
        made = f"{name} was made for sentence-transformers"
        if not self.modes:
            return f"{made}, but its 1_Pooling/config.json does not say which pooling it uses."
        modes = " and ".join(self.modes)
        if self.pooling is None:
            return f"{made} with the pooling {modes}, which is not available here."
        ends = f" sentence-transformers then applies {', '.join(self.later)}." if self.later else ""
        return (
            f"{made}: its vector of a protein is the {modes} pooling over all tokens, <cls> and <eos> included, which "
            f"--pooling {self.pooling} gives.{ends}"
        )


def sentence_pooling(source: str, **hub: Any) -> SentencePooling | None:
    """Return the pooling of a repository made for sentence-transformers; None for any other.

    Args:
        source: Hub id or folder.
        hub: the arguments of `find_file`.

    Raises:
        OSError: see `find_file`.
        CheckpointError: `modules.json` or the config of the pooling is damaged.
    """
    if (modules := find_file(source, "modules.json", **hub)) is None:
        return None
    try:
        with open(modules, encoding="utf-8") as file:
            listed = [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in json.load(file)]
        kinds = [kind for kind, _ in listed]
        if "Pooling" not in kinds:
            return None
        place = kinds.index("Pooling")
        subfolder = "/".join(part for part in (hub.pop("subfolder", ""), listed[place][1]) if part)
        path = find_file(source, "config.json", subfolder=subfolder, **hub)
        fields: dict[str, Any] = {}
        if path is not None:
            with open(path, encoding="utf-8") as file:
                fields = dict(json.load(file))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{source}: modules.json and 1_Pooling/config.json of sentence-transformers cannot be read ({error!r}). "
            "Download them again."
        ) from error
    if isinstance(fields.get("pooling_mode"), str):  # of later versions
        modes = [fields["pooling_mode"]]
    else:
        flags = sorted(name for name, value in fields.items() if name.startswith("pooling_mode_") and value is True)
        modes = [name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for name in flags]
    return SentencePooling(modes, kinds[place + 1 :])
