"""mlx-esm generate"""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_esm_hf.cli.options import (
    Activations,
    Aligned,
    BatchTokens,
    Device,
    Dtype,
    Long,
    Model,
    OptionalFasta,
    Output,
    Quiet,
    Revision,
    Strict,
    tokens_of,
)
from mlx_esm_hf.cli.running import running


def command(
    *,
    fasta: OptionalFasta = None,
    model: Model,
    output: Output,
    length: Annotated[int | None, typer.Option(help="Residues of a design from nothing, without FASTA.", min=1)] = None,
    samples: Annotated[int, typer.Option(help="Designs for each protein.", min=1)] = 1,
    order: Annotated[str, typer.Option(help="confidence, left-to-right, or gibbs.")] = "confidence",
    sweeps: Annotated[int, typer.Option(help="How often gibbs draws each free position anew.", min=0)] = 10,
    fixed: Annotated[str | None, typer.Option(help="Positions to keep, such as 1-10,25; all others are free.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable residue.", min=0)] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many residues; 0, all.", min=0)] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the most probable that make up this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal designs.", min=0)] = 0,
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
    """Design sequences: fill each <mask> of proteins, or --length masks.

    The output is a FASTA file.

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
            batch_tokens=tokens_of(batch_tokens),
            aligned=aligned,
            strict=strict,
            progress=run.show,
        )
    run.finish(output, report)
