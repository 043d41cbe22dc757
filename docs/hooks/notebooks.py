"""Show the notebooks, which are stored as Python text (jupytext's percent format), as pages of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

FOLDER = Path(__file__).parents[2] / "notebooks"
IMAGES = Path(__file__).parents[1] / "images"
SOURCE = "https://github.com/mlx-esm-hf/mlx-esm-hf/blob/main/notebooks"


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each notebook."""
    for path in sorted(FOLDER.glob("*.py")):
        page = File.generated(config, f"notebooks/{path.stem}.md", content=page_of(path))
        page.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """List the notebooks on their page."""
    if page.file.src_uri != "notebooks.md":
        return markdown
    entries = []
    for path in sorted(FOLDER.glob("*.py")):
        heading, first_paragraph = page_of(path).split("\n\n")[:2]
        title = heading.removeprefix("# ")
        pictures = "".join(f"![{title}](images/{picture.name})\n\n" for picture in pictures_of(path))
        entries.append(f"## [{title}](notebooks/{path.stem}.md)\n\n{first_paragraph}\n\n{pictures}")
    return markdown + "\n" + "\n".join(entries)


def pictures_of(path: Path) -> list[Path]:
    """Return the stored pictures whose names begin with that of a notebook."""
    return sorted(IMAGES.glob(f"{path.stem}*.png"))


def page_of(path: Path) -> str:
    """Return a notebook as Markdown, with its stored pictures after the first paragraph."""
    cells = re.split(r"^# %%(.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    parts = []
    for kind, text in zip(cells[::2], cells[1::2], strict=True):
        if "[markdown]" in kind:
            parts.append(re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE))
        elif code := re.sub(r"^# %matplotlib.*\n", "", text.strip(), flags=re.MULTILINE):
            parts.append(f"```python\n{code}\n```")
    pictures = "".join(f"![Picture of this notebook](../images/{picture.name})\n\n" for picture in pictures_of(path))
    title, _, rest = parts[0].partition("\n\n")
    first, _, rest = rest.partition("\n\n")
    source = f"[The notebook]({SOURCE}/{path.name})"
    return "\n\n".join([title, first, f"{pictures}{source}", rest, *parts[1:]]) + "\n"
