"""The command `mlx-esm fill-mask`."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_esm_hf.checks import MOST
from mlx_esm_hf.cli import options as opt
from mlx_esm_hf.cli.running import running


def command(
    fasta: opt.Fasta,
    model: opt.Model,
    output: opt.Output,
    top_k: Annotated[int, typer.Option(help="Residues to propose per mask.", min=1, max=MOST)] = 5,
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
    """Predict the residue at each <mask>, most probable first.

    Writes a CSV file with one row per proposal.

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
            batch_tokens=opt.parse_batch_tokens(batch_tokens),
            aligned=aligned,
            structure=structure,
            strict=strict,
            progress=run.show,
        )
    run.finish(output, report)
