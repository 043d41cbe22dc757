"""mlx-esm score"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_esm_hf.cli.options import Activations, BatchTokens, Device, Dtype, Long, Models, Quiet, Revision, tokens_of
from mlx_esm_hf.cli.running import running


def command(
    sequence: Annotated[str, typer.Option(help="The wild type, or a FASTA file with it.")],
    model: Models,
    output: Annotated[Path, typer.Option(help="The CSV file to write.")],
    mutants: Annotated[
        Path | None, typer.Argument(help="CSV with a column of mutations; without, all of them.", dir_okay=False)
    ] = None,
    method: Annotated[
        str, typer.Option(help="masked-marginals, wt-marginals (one pass), or pseudo-perplexity (of each mutant).")
    ] = "masked-marginals",
    mutant_column: Annotated[str, typer.Option(help="Of the CSV file: A42G, or A42G:L7P.")] = "mutant",
    first_residue: Annotated[int, typer.Option(help="The number of the first residue in the table.")] = 1,
    picture: Annotated[Path | None, typer.Option(help="Without MUTANTS: a heat map, .png or .svg.")] = None,
    revision: Revision = None,
    dtype: Dtype = None,
    activation_dtype: Activations = None,
    device: Device = None,
    long: Long = "error",
    batch_tokens: BatchTokens = "auto",
    quiet: Quiet = False,
) -> None:
    """Score mutations without training on them: the higher, the more natural is the mutant to the model.

    The output is the table with a column for each model, and their mean if they are several. Without MUTANTS all 20
    residues at each position are scored.

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
            picture=picture,
            revision=revision,
            dtype=dtype,
            activation_dtype=activation_dtype,
            device=device,
            long=long,
            batch_tokens=tokens_of(batch_tokens),
            progress=run.show,
        )
    run.finish(output, Report(replaced=scores.replaced, left_out=scores.left_out))
