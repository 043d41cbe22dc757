"""mlx-esm perplexity"""

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
    method: Annotated[str, typer.Option(help="exact (a pass for each residue), or one-pass, an estimate.")] = "exact",
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
    """Pseudo-perplexity: how well the model foresees each residue from all others; low is natural.

    The output is a CSV file.

    Example: mlx-esm perplexity proteins.fasta --model facebook/esm2_t6_8M_UR50D --output perplexity.csv
    """
    with running(output, quiet, source=fasta) as run:
        from mlx_esm_hf.jobs.perplexity import perplexity

        report = perplexity(
            fasta,
            model,
            output,
            method=method,
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
