"""mlx-esm convert"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mlx_esm_hf.cli.options import Revision
from mlx_esm_hf.cli.push import listing
from mlx_esm_hf.cli.running import stderr, told
from mlx_esm_hf.errors import UserError


def command(
    source: Annotated[str, typer.Argument(help="A checkpoint on the Hub, or a folder.")],
    output_dir: Annotated[Path, typer.Argument(help="The folder to write; it must not hold anything yet.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16, of what is not quantized; by default as it is.")
    ] = None,
    quantize: Annotated[bool, typer.Option("--quantize", "-q", help="Quantize the layers of the encoder.")] = False,
    bits: Annotated[
        int | None, typer.Option("--bits", "--q-bits", help="2, 3, 4, 5, 6 or 8 of a number; by default 4.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            "--q-group-size",
            help="Numbers that share a scale: 32, 64 or 128; by default 64, and 32 with --activation-dtype.",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode", "--q-mode", help="affine (the default), or mxfp4, mxfp8, nvfp4, which fix the other two."
        ),
    ] = None,
    activation_dtype: Annotated[
        str | None,
        typer.Option(help="int8: round what the quantized layers are given, too, for 4 and 8 bits; faster on a CPU."),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="PATTERN=HOW for layers whose path fits the pattern: bits (affine), a mode, or full for full "
            "precision. Once for each of several; the last that fits counts."
        ),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", "-d", help="Make a plain checkpoint of a quantized one.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of weights.")] = "5GB",
    revision: Revision = None,
    report: Annotated[
        str | None,
        typer.Option(help="FASTA: compare the result with the source on these proteins: memory, speed, answers."),
    ] = None,
    upload_repo: Annotated[str | None, typer.Option(help="Publish the result there, as mlx-esm push does.")] = None,
) -> None:
    """Write a checkpoint in another precision: cast, quantized or dequantized.

    Embeddings, heads and the contact head are not quantized unless a --rule says so. Without options the checkpoint is
    written anew, in safetensors.

    Example: mlx-esm convert facebook/esm2_t33_650M_UR50D esm2-650M-4bit --quantize --bits 4 --rule "lm_head.*=8"
    """
    with told(stderr(), lambda: f"Stopped. {output_dir} is whole, or not there."):
        from mlx_esm_hf.quantization.convert import convert

        conversion = convert(
            source,
            output_dir,
            dtype=dtype,
            quantize=quantize,
            bits=bits,
            group_size=group_size,
            mode=mode,
            activation_dtype=activation_dtype,
            rules=dict(parse_rule(text) for text in rule or []),
            dequantize=dequantize,
            max_shard_size=max_shard_size,
            revision=revision,
            report=report,
            upload_repo=upload_repo,
        )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for note in conversion.notes:
        console.print(note)
    table = Table.grid(padding=(0, 2))
    table.add_row("", "before", "after")
    for row in conversion.rows:
        table.add_row(*row)
    console.print(table)
    if conversion.publication:
        for line in listing(conversion.publication):
            typer.echo(line)


def parse_rule(text: str) -> tuple[str, int | str | None]:
    """(pattern, how) of "lm_head.*=8".

    Raises:
        ValueError: there is no "=".
    """
    pattern, sign, how = text.rpartition("=")
    if not (pattern and sign and how):
        raise UserError(f"--rule {text}: PATTERN=HOW is needed, such as lm_head.*=8.")
    if how == "full":
        return pattern, None
    return pattern, int(how) if how.isdecimal() else how
