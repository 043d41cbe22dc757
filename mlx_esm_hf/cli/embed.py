"""The command `mlx-esm embed`."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from mlx_esm_hf.cli import options as opt
from mlx_esm_hf.cli.running import running
from mlx_esm_hf.errors import UserError


def command(
    fasta: opt.Fasta,
    model: opt.Model,
    output: opt.Output,
    layers: Annotated[
        str, typer.Option(help="Comma-separated layers: 0 for the embeddings, -1 for the last layer, such as 0,6,-1.")
    ] = "-1",
    pooling: Annotated[
        str,
        typer.Option(
            help="Comma-separated: mean, max, cls, residues (one row per residue), chains, spans, mean_tokens, "
            "max_tokens."
        ),
    ] = "mean",
    revision: opt.Revision = None,
    dtype: opt.Dtype = None,
    activation_dtype: opt.ActivationDtype = None,
    device: opt.Device = None,
    long: opt.Long = "error",
    batch_tokens: opt.BatchTokens = "auto",
    aligned: opt.Aligned = False,
    structure: opt.Structure = None,
    strict: opt.Strict = False,
    quiet: opt.Quiet = False,
) -> None:
    """Embed proteins: one vector per protein (mean, max or <cls>) or one per residue, from any layer.

    Writes .h5, .npz, .parquet, .safetensors or .csv (without residues), or a folder of shards.

    Example: mlx-esm embed proteins.fasta --model facebook/esm2_t6_8M_UR50D --output embeddings.h5
    """
    with running(output, quiet, source=fasta) as run:
        from mlx_esm_hf.jobs.embed import embed

        report = embed(
            fasta,
            model,
            output,
            layers=parse_layers(layers),
            pooling=opt.parse_list(pooling),
            revision=revision,
            dtype=dtype,
            activation_dtype=activation_dtype,
            device=device,
            long=long,
            batch_tokens=opt.parse_batch_tokens(batch_tokens),
            aligned=aligned,
            structure=structure,
            strict=strict,
            progress=run.show,
        )
    run.finish(output, report)


def parse_layers(text: str) -> list[int]:
    """Return the layers of a list such as "0,6,-1".

    Raises:
        UserError: an entry is not an integer.
    """
    layers = opt.parse_list(text)
    if not layers or not all(re.fullmatch(r"-?[0-9]{1,9}", layer) for layer in layers):
        raise UserError(f"--layers must be a comma-separated list of integers such as 0,6,-1, got {text or 'nothing'}.")
    return [int(layer) for layer in layers]
