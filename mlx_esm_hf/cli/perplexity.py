"""mlx-esm perplexity"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mlx_esm_hf.cli.jobs import on_proteins


@on_proteins
def perplexity(
    method: Annotated[str, typer.Option(help="exact (a pass for each residue), or one-pass, an estimate.")] = "exact",
) -> dict[str, Any]:
    """Pseudo-perplexity: how well the model foresees each residue from all others; low is natural.

    The output is a CSV file.

    Example: mlx-esm perplexity proteins.fasta --model facebook/esm2_t6_8M_UR50D --output perplexity.csv
    """
    return {"method": method}
