"""The command `mlx-esm generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_esm_hf.checks import MOST, MOST_LENGTH, MOST_SAMPLES, MOST_SEED, MOST_SWEEPS
from mlx_esm_hf.cli import options as opt
from mlx_esm_hf.cli.running import running

SAMPLING = "Sampling"


def command(
    *,
    fasta: opt.OptionalFasta = None,
    model: opt.Model,
    output: opt.Output,
    length: Annotated[
        int | None, typer.Option(help="Number of residues of a new protein; instead of FASTA.", min=1, max=MOST_LENGTH)
    ] = None,
    samples: Annotated[int, typer.Option(help="Designs per protein.", min=1, max=MOST_SAMPLES)] = 1,
    order: Annotated[
        str, typer.Option(help="Order of filling: confidence, left-to-right or gibbs.", rich_help_panel=SAMPLING)
    ] = "confidence",
    sweeps: Annotated[
        int,
        typer.Option(
            help="Times gibbs resamples each free position.", min=0, max=MOST_SWEEPS, rich_help_panel=SAMPLING
        ),
    ] = 10,
    fixed: Annotated[
        str | None,
        typer.Option(help="Positions to keep, such as 1-10,25; all others are free.", rich_help_panel=SAMPLING),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(help="0 takes the most probable residue.", callback=opt.number(0), rich_help_panel=SAMPLING),
    ] = 1.0,
    top_k: Annotated[
        int,
        typer.Option(
            help="Sample from the k most probable residues; 0: from all.", min=0, max=MOST, rich_help_panel=SAMPLING
        ),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the smallest set of residues with at least this probability.",
            callback=opt.number(above=0, high=1),
            rich_help_panel=SAMPLING,
        ),
    ] = 1.0,
    seed: Annotated[
        int,
        typer.Option(
            help="Random seed. Equal seeds give equal designs.", min=0, max=MOST_SEED, rich_help_panel=SAMPLING
        ),
    ] = 0,
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
    """Design proteins: fill each <mask> of the input, or --length masks.

    Writes a FASTA file.

    Example: mlx-esm generate --length 100 --samples 4 --model facebook/esm2_t33_650M_UR50D --output designs.fasta
    """
    with running(output, quiet, source=fasta or "") as run:
        from mlx_esm_hf.jobs.generate import generate

        report = generate(
            fasta,
            model,
            output,
            length=length,
            samples=samples,
            order=order,
            sweeps=sweeps,
            fixed=fixed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
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
