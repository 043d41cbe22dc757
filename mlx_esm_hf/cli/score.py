"""The command `mlx-esm score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_esm_hf.checks import MOST
from mlx_esm_hf.cli import options as opt
from mlx_esm_hf.cli.running import running


def command(
    sequence: Annotated[str, typer.Option(help="The wild type: a sequence, or a FASTA file with it.")],
    model: opt.Models,
    output: Annotated[Path, typer.Option(*opt.OUTPUT_NAMES, help="CSV file to write.")],
    mutants: Annotated[
        Path | None,
        typer.Argument(help="CSV file with a column of mutations. Default: all single mutations."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="masked-marginals, wt-marginals (one pass) or pseudo-perplexity (of each mutant; slow)."),
    ] = "masked-marginals",
    mutant_column: Annotated[
        str, typer.Option(help="Column with the mutations, such as A42G or A42G:L7P.", rich_help_panel=opt.INPUT)
    ] = "mutant",
    first_residue: Annotated[
        int,
        typer.Option(
            help="Number of the sequence's first residue in the table.", min=-MOST, max=MOST, rich_help_panel=opt.INPUT
        ),
    ] = 1,
    structure: opt.Structure = None,
    picture: Annotated[
        Path | None, typer.Option(help="Plot a heat map to a .png or .svg file (only without MUTANTS).")
    ] = None,
    revision: opt.Revision = None,
    dtype: opt.Dtype = None,
    activation_dtype: opt.ActivationDtype = None,
    device: opt.Device = None,
    long: opt.Long = "error",
    batch_tokens: opt.BatchTokens = "auto",
    quiet: opt.Quiet = False,
) -> None:
    """Score the effects of mutations without training. A higher score means a mutant that the model finds more natural.

    Writes the table with one column per model, and their mean for several models. Without MUTANTS, all 20 residues
    (or 4 nucleotides) at each position are scored.

    Example: mlx-esm score mutants.csv --sequence MKTAYIAKQR --model facebook/esm1v_t33_650M_UR90S_1 --output scores.csv
    """
    with running(output, quiet) as run:
        from mlx_esm_hf.data.proteins import Report
        from mlx_esm_hf.jobs.score import score

        scores = score(
            mutants,
            sequence,
            model,
            output,
            method=method,
            mutant_column=mutant_column,
            first_residue=first_residue,
            structure=structure,
            picture=picture,
            revision=revision,
            dtype=dtype,
            activation_dtype=activation_dtype,
            device=device,
            long=long,
            batch_tokens=opt.parse_batch_tokens(batch_tokens),
            progress=run.show,
        )
    run.finish(output, Report(replaced=scores.replaced, unknown=scores.unknown, left_out=scores.left_out))
