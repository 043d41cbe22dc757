"""The command `mlx-esm fold`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_esm_hf.checks import MOST_RECYCLES
from mlx_esm_hf.cli import options as opt
from mlx_esm_hf.cli.running import running


def command(
    fasta: opt.Fasta,
    model: opt.Model,
    output: Annotated[
        Path, typer.Option(*opt.OUTPUT_NAMES, help="Folder to write, or the .pdb or .cif file of a single protein.")
    ],
    formats: Annotated[str, typer.Option(help="Structure files in a folder: pdb, cif or both.")] = "pdb,cif",
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Also plot pLDDT and the predicted aligned error as .png files.")
    ] = False,
    num_recycles: Annotated[
        int | None,
        typer.Option(
            help="Times the trunk runs again. Default: as in the model's config.",
            min=0,
            max=MOST_RECYCLES,
            rich_help_panel=opt.COMPUTING,
        ),
    ] = None,
    revision: opt.Revision = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="dtype of the trunk: float32 or bfloat16. Default: as in the checkpoint.", rich_help_panel=opt.LOADING
        ),
    ] = None,
    device: opt.Device = None,
    batch_tokens: opt.BatchTokens = "auto",
    strict: opt.Strict = False,
    quiet: opt.Quiet = False,
) -> None:
    """Predict structures with ESMFold: PDB and mmCIF files with pLDDT (0 to 100) as B factor.

    A record is one protein; `:` separates its chains. The folder has for each protein its structure, the predicted
    aligned error (_pae.json as in AlphaFold DB, and .npz with pLDDT) and, with --pictures, plots. index.csv lists mean
    pLDDT, pTM, length, chains, recycles and seconds.

    Example: mlx-esm fold proteins.fasta --model facebook/esmfold_v1 --output structures
    """
    with running(output, quiet, source=fasta) as run:
        from mlx_esm_hf.jobs.fold import fold

        report = fold(
            fasta,
            model,
            output,
            formats=opt.parse_list(formats),
            pictures=pictures,
            num_recycles=num_recycles,
            revision=revision,
            dtype=dtype,
            device=device,
            batch_tokens=opt.parse_batch_tokens(batch_tokens),
            strict=strict,
            progress=run.show,
        )
    run.finish(output, report)
