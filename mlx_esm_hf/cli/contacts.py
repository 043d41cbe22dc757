"""mlx-esm contacts"""

from __future__ import annotations

from pathlib import Path
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
    top: Annotated[Path | None, typer.Option(help="Write the most probable contacts to this CSV file, too.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the map of the only protein, .png or .svg.")] = None,
    structure: Annotated[
        Path | None, typer.Option(help="PDB or mmCIF: its contacts and the precision go into the picture.")
    ] = None,
    chain: Annotated[str | None, typer.Option(help="Of the structure; by default the one that fits best.")] = None,
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
    """Predict which residues touch: a map of probabilities (.npz), or the list of the most probable (.csv).

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
            batch_tokens=tokens_of(batch_tokens),
            aligned=aligned,
            strict=strict,
            progress=run.show,
        )
    run.finish(output, report)
