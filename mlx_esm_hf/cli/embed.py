"""mlx-esm embed"""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_esm_hf.cli.options import (
    Activations,
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
    tokens_of,
)
from mlx_esm_hf.cli.running import running
from mlx_esm_hf.errors import UserError


def command(
    fasta: Fasta,
    model: Model,
    output: Output,
    layers: Annotated[str, typer.Option(help="Such as -1 or 0,6,-1; 0 are the embeddings, -1 the last layer.")] = "-1",
    pooling: Annotated[
        str, typer.Option(help="Of mean, max, cls, residues and chains, such as mean,residues.")
    ] = "mean",
    revision: Revision = None,
    dtype: Dtype = None,
    activation_dtype: Activations = None,
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
    with running(output, quiet, source=fasta) as run:
        from mlx_esm_hf.jobs.embed import embed

        report = embed(
            fasta,
            model,
            output,
            layers=numbers(layers),
            pooling=listed(pooling),
            revision=revision,
            dtype=dtype,
            activation_dtype=activation_dtype,
            device=device,
            long=long,
            batch_tokens=tokens_of(batch_tokens),
            aligned=aligned,
            strict=strict,
            progress=run.show,
        )
    run.finish(output, report)


def numbers(layers: str) -> list[int]:
    """The layers of a list like "0,6,-1".

    Raises:
        ValueError: it is none.
    """
    try:
        return [int(layer) for layer in listed(layers)]
    except ValueError:
        raise UserError(f"--layers {layers}: numbers are needed, such as 0,6,-1.") from None
