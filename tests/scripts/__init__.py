"""Twenty scripts as the public writes them: for transformers in `on_torch`, ported by the guide in `on_mlx`."""

from __future__ import annotations

import ast
import difflib
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in (FOLDER / "on_torch").glob("*.py"))


def lines_of(side: str, name: str) -> list[str]:
    """Return the lines of code of a script, without its docstring, comments and blank lines."""
    text = (FOLDER / side / f"{name}.py").read_text(encoding="utf-8")
    lines = text.splitlines()[ast.parse(text).body[0].end_lineno :]
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def changed_lines(name: str) -> int:
    """Return how many lines of a script the port replaces, removes or adds.

    A block of lines that replaces another one counts as the longer of the two.
    """
    matcher = difflib.SequenceMatcher(None, lines_of("on_torch", name), lines_of("on_mlx", name), autojunk=False)
    return sum(
        max(before_end - before, after_end - after)
        for kind, before, before_end, after, after_end in matcher.get_opcodes()
        if kind != "equal"
    )


def table() -> str:
    """Return the Markdown table of the migration guide: the lines of each script, and how many the port changes."""
    rows = ["| script | lines | changed |", "|---|---|---|"]
    for name in NAMES:
        rows.append(f"| {name.replace('_', ' ')} | {len(lines_of('on_torch', name))} | {changed_lines(name)} |")
    lines, changed = sum(len(lines_of("on_torch", name)) for name in NAMES), sum(map(changed_lines, NAMES))
    return "\n".join([*rows, f"| all | {lines} | {changed} |"])
