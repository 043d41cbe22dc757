"""Prepare docstrings for the API reference, before griffe parses them."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rename "Example:", which griffe knows only as "Examples:", and keep tokens such as <cls> from being HTML."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of each object once it is loaded."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            pieces = text.split("`")  # every second one is code
            pieces[::2] = [re.sub(r"<(\w+)>", r"`<\1>`", piece) for piece in pieces[::2]]
            obj.docstring.value = "`".join(pieces)
