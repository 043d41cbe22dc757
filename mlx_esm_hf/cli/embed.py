"""mlx-esm embed"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlx_esm_hf.cli.errors import readable_errors


def embed(
    fasta: Annotated[Path, typer.Argument(help="Proteins in FASTA, plain or gzipped.", exists=True, dir_okay=False)],
    model: Annotated[str, typer.Option(help="A model on the Hub, or a folder.")],
    output: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    batch_tokens: Annotated[
        int | None, typer.Option(help="Most tokens that go through the model together.", min=1)
    ] = None,
) -> None:
    """Embed proteins: the mean of the last hidden state over the residues of each.

    The output has one tensor, "mean", with a row for each protein, and their ids in its metadata.

    Example: mlx-esm embed proteins.fasta --model facebook/esm2_t6_8M_UR50D --output embeddings.safetensors
    """
    from transformers import AutoTokenizer

    from mlx_esm_hf import MLXEsmModel
    from mlx_esm_hf.pipelines import embed as pipeline
    from mlx_esm_hf.pipelines.fasta import read_fasta

    console = Console(stderr=True)
    with readable_errors():
        proteins = list(read_fasta(fasta))
        if not proteins:
            raise ValueError(f"{fasta} holds no proteins.")
        esm = MLXEsmModel.from_pretrained(model, add_pooling_layer=False)
        tokenizer = AutoTokenizer.from_pretrained(model)
        residues = sum(len(protein.sequence) for protein in proteins)
        columns = (TextColumn("residues"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        start = time.perf_counter()
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=residues)
            embeddings = pipeline.embed(esm, tokenizer, proteins, batch_tokens, lambda n: bar.advance(task, n))
        seconds = time.perf_counter() - start
        metadata = {"model": model, "dtype": str(esm.dtype)}
        pipeline.save_embeddings(output, embeddings, [protein.id for protein in proteins], metadata)
    console.print(
        f"{len(proteins)} proteins, {residues} residues in {seconds:.1f} s "
        f"({residues / seconds:.0f} residues/s): {output}",
        highlight=False,
        soft_wrap=True,
    )
