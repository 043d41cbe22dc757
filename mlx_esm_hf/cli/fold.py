"""mlx-esm fold"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_esm_hf.cli.options import BatchTokens, Device, Fasta, Model, Quiet, Revision, Strict, listed, tokens_of
from mlx_esm_hf.cli.running import running


def command(
    fasta: Fasta,
    model: Model,
    output: Annotated[Path, typer.Option(help="A folder; or the .pdb or .cif file of the only protein.")],
    formats: Annotated[str, typer.Option(help="Of the structures in a folder: pdb, cif, or both.")] = "pdb,cif",
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Draw pLDDT along the chain, and the aligned error, as .png, too.")
    ] = False,
    num_recycles: Annotated[
        int | None, typer.Option(help="How often the trunk runs again; by default as the model's config says.")
    ] = None,
    revision: Revision = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the trunk: float32 or bfloat16; by default as in the checkpoint.")
    ] = None,
    device: Device = None,
    batch_tokens: BatchTokens = "auto",
    strict: Strict = False,
    quiet: Quiet = False,
) -> None:
    """Fold proteins with ESMFold: structures as PDB and mmCIF, with pLDDT (0 to 100) in the B factor.

    In the FASTA a record is a protein, with : between its chains. A folder has for each protein its structure, the
    predicted aligned error (_pae.json as in AlphaFold DB, and .npz with pLDDT), and pictures if asked for; index.csv
    has mean pLDDT, pTM, length, chains, recycles and seconds of each.

    Example: mlx-esm fold proteins.fasta --model facebook/esmfold_v1 --output structures
    """
    with running(output, quiet, source=fasta) as run:
        from mlx_esm_hf.jobs.fold import fold

        report = fold(
            fasta,
            model,
            output,
            formats=listed(formats),
            pictures=pictures,
            num_recycles=num_recycles,
            revision=revision,
            dtype=dtype,
            device=device,
            batch_tokens=tokens_of(batch_tokens),
            strict=strict,
            progress=run.show,
        )
    run.finish(output, report)
