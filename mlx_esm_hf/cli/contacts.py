"""mlx-esm contacts"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_esm_hf.cli.jobs import on_proteins


@on_proteins
def contacts(
    top: Annotated[Path | None, typer.Option(help="Write the most probable contacts to this CSV file, too.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the map of the only protein, .png or .svg.")] = None,
    structure: Annotated[
        Path | None, typer.Option(help="PDB or mmCIF: its contacts and the precision go into the picture.")
    ] = None,
    chain: Annotated[str | None, typer.Option(help="Of the structure; by default the one that fits best.")] = None,
) -> dict[str, Any]:
    """Predict which residues touch: a map of probabilities (.npz), or the list of the most probable (.csv).

    Example: mlx-esm contacts protein.fasta --model facebook/esm2_t6_8M_UR50D --output map.npz --picture map.png
    """
    return {"top": top, "picture": picture, "structure": structure, "chain": chain}
