"""The command `mlx-esm contacts`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_esm_hf.cli import options as opt
from mlx_esm_hf.cli.running import running


def command(
    fasta: opt.Fasta,
    model: opt.Model,
    output: opt.Output,
    top: Annotated[Path | None, typer.Option(help="Also write the most probable contacts to this CSV file.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Plot the map to a .png or .svg file (only for a single protein).")
    ] = None,
    structure: Annotated[
        Path | None, typer.Option(help="PDB or mmCIF file: plot its contacts too, with the precision.")
    ] = None,
    chain: Annotated[
        str | None, typer.Option(help="Chain of the structure. Default: the one that matches the protein best.")
    ] = None,
    revision: opt.Revision = None,
    dtype: opt.Dtype = None,
    activation_dtype: opt.ActivationDtype = None,
    device: opt.Device = None,
    long: opt.Long = "error",
    batch_tokens: opt.BatchTokens = "auto",
    aligned: opt.Aligned = False,
    strict: opt.Strict = False,
    quiet: opt.Quiet = False,
) -> None:
    """Predict contacts: a map of probabilities (.npz) or a list of the most probable pairs (.csv).

    Example: mlx-esm contacts protein.fasta --model facebook/esm2_t6_8M_UR50D --output map.npz --picture map.png
    """
    with running(output, quiet, source=fasta) as run:
        from mlx_esm_hf.jobs.contacts import contacts

        report = contacts(
            fasta,
            model,
            output,
            top=top,
            picture=picture,
            structure=structure,
            chain=chain,
            revision=revision,
            dtype=dtype,
            activation_dtype=activation_dtype,
            device=device,
            long=long,
            batch_tokens=opt.parse_batch_tokens(batch_tokens),
            aligned=aligned,
            strict=strict,
            progress=run.show,
        )
    run.finish(output, report)
