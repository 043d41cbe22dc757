"""mlx-esm embed"""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_esm_hf.cli.jobs import finish, job
from mlx_esm_hf.cli.options import (
    Aligned,
    BatchTokens,
    Device,
    Dtype,
    Fasta,
    Long,
    Model,
    Output,
    Quiet,
    Revision,
    Strict,
    listed,
    loading,
)


def embed(
    fasta: Fasta,
    model: Model,
    output: Output,
    layers: Annotated[str, typer.Option(help="Such as -1 or 0,6,-1; 0 are the embeddings, -1 the last layer.")] = "-1",
    pooling: Annotated[str, typer.Option(help="Of mean, max, cls and residues, such as mean,residues.")] = "mean",
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    long: Long = "error",
    batch_tokens: BatchTokens = "auto",
    aligned: Aligned = False,
    strict: Strict = False,
    quiet: Quiet = False,
) -> None:
    """Embed proteins: for each the mean, maximum or <cls> of its hidden states, or those of all its residues.

    The output is a folder of shards, or a .safetensors, .npz, .h5 (UniProt's layout) or .parquet file.

    Example: mlx-esm embed proteins.fasta --model facebook/esm2_t6_8M_UR50D --output embeddings.h5
    """
    with job(output, quiet, fasta == "-") as progress:
        from mlx_esm_hf import pipelines

        try:
            numbers = [int(layer) for layer in listed(layers)]
        except ValueError:
            raise ValueError(f"--layers {layers}: numbers are needed, such as 0,6,-1.") from None
        report = pipelines.embed(
            fasta,
            model,
            output,
            layers=numbers,
            pooling=listed(pooling),
            aligned=aligned,
            strict=strict,
            progress=progress,
            **loading(revision, dtype, device, long, batch_tokens),
        )
    finish(report, quiet)
