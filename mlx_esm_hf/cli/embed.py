"""mlx-esm embed"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mlx_esm_hf.cli.jobs import on_proteins
from mlx_esm_hf.cli.options import listed


@on_proteins
def embed(
    layers: Annotated[str, typer.Option(help="Such as -1 or 0,6,-1; 0 are the embeddings, -1 the last layer.")] = "-1",
    pooling: Annotated[str, typer.Option(help="Of mean, max, cls and residues, such as mean,residues.")] = "mean",
) -> dict[str, Any]:
    """Embed proteins: for each the mean, maximum or <cls> of its hidden states, or those of all its residues.

    The output is a folder of shards, or a .safetensors, .npz, .h5 (UniProt's layout) or .parquet file.

    Example: mlx-esm embed proteins.fasta --model facebook/esm2_t6_8M_UR50D --output embeddings.h5
    """
    try:
        numbers = [int(layer) for layer in listed(layers)]
    except ValueError:
        raise ValueError(f"--layers {layers}: numbers are needed, such as 0,6,-1.") from None
    return {"layers": numbers, "pooling": listed(pooling)}
