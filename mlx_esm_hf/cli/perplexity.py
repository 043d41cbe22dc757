"""The command `mlx-esm perplexity`."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_esm_hf.cli import options as opt
from mlx_esm_hf.cli.running import running


def command(
    fasta: opt.Fasta,
    model: opt.Model,
    output: opt.Output,
    method: Annotated[str, typer.Option(help="exact (one pass per residue) or one-pass (an estimate).")] = "exact",
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
    """Compute the pseudo-perplexity: how well the model predicts each residue from all others.

    Natural proteins score low. Writes a CSV file.

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
            batch_tokens=opt.parse_batch_tokens(batch_tokens),
            aligned=aligned,
            structure=structure,
            strict=strict,
            progress=run.show,
        )
    run.finish(output, report)
