"""mlx-esm fill-mask"""

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
    tokens_of,
)
from mlx_esm_hf.cli.running import running


def command(
    fasta: Fasta,
    model: Model,
    output: Output,
    top_k: Annotated[int, typer.Option(help="Proposals for each mask.", min=1)] = 5,
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
    """Propose residues for each <mask> in the sequences, most probable first.

    The output is a CSV file with a row for each proposal.

    Example: mlx-esm fill-mask masked.fasta --model facebook/esm2_t6_8M_UR50D --output proposals.csv
    """
    with running(output, quiet, source=fasta) as run:
        from mlx_esm_hf.jobs.fill_mask import fill_mask

        report = fill_mask(
            fasta,
            model,
            output,
            top_k=top_k,
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
