"""mlx-esm fill-mask"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mlx_esm_hf.cli.jobs import on_proteins


@on_proteins
def fill_mask(
    top_k: Annotated[int, typer.Option(help="Proposals for each mask.", min=1)] = 5,
) -> dict[str, Any]:
    """Propose residues for each <mask> in the sequences, most probable first.

    The output is a CSV file with a row for each proposal.

    Example: mlx-esm fill-mask masked.fasta --model facebook/esm2_t6_8M_UR50D --output proposals.csv
    """
    return {"top_k": top_k}
