"""The command `mlx-esm fold`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_esm_hf.checks import MOST_RECYCLES, MOST_SAMPLES, MOST_SEED, MOST_STEPS
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
            help="ESMFold: times the trunk runs again. Default: as in the config.",
            min=0,
            max=MOST_RECYCLES,
            rich_help_panel=opt.COMPUTING,
        ),
    ] = None,
    loops: Annotated[
        int | None,
        typer.Option(
            help="ESMFold2: times the trunk runs again. Default: as in the config.",
            min=0,
            max=MOST_RECYCLES,
            rich_help_panel=opt.COMPUTING,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="ESMFold2: structures to sample; the one with the highest confidence is kept. Default: 1, or 5 for "
            "several chains.",
            min=1,
            max=MOST_SAMPLES,
            rich_help_panel=opt.COMPUTING,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="ESMFold2: steps of the noise schedule. Default: as in the config.",
            min=1,
            max=MOST_STEPS,
            rich_help_panel=opt.COMPUTING,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="ESMFold2: seed of all random numbers. Default: 0.",
            min=0,
            max=MOST_SEED,
            rich_help_panel=opt.COMPUTING,
        ),
    ] = None,
    msa: Annotated[
        Path | None,
        typer.Option(
            help="ESMFold2: folder with alignments, ID.a3m for a protein, ID_1.a3m and so on for its chains.",
            rich_help_panel=opt.COMPUTING,
        ),
    ] = None,
    free_stem: Annotated[
        bool,
        typer.Option(
            "--free-stem",
            help="ESMFold2: run the language model on all proteins first, then free its memory.",
            rich_help_panel=opt.COMPUTING,
        ),
    ] = False,
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
    """Predict structures with ESMFold or ESMFold2: PDB and mmCIF files with pLDDT (0 to 100) as B factor.

    A record is one protein; `:` separates its chains. The folder has for each protein its structure, the predicted
    aligned error (_pae.json as in AlphaFold DB, and .npz with pLDDT) and, with --pictures, plots. index.csv lists mean
    pLDDT, pTM, length, chains and seconds; for ESMFold2 also ipTM and the sample that was kept.

    Example: mlx-esm fold proteins.fasta --model biohub/ESMFold2-Fast --output structures
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
            num_loops=loops,
            num_samples=samples,
            num_steps=steps,
            seed=seed,
            msa=msa,
            free_stem=free_stem,
            revision=revision,
            dtype=dtype,
            device=device,
            batch_tokens=opt.parse_batch_tokens(batch_tokens),
            strict=strict,
            progress=run.show,
        )
    run.finish(output, report)
