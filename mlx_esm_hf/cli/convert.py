"""The command `mlx-esm convert`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mlx_esm_hf.cli import options as opt
from mlx_esm_hf.cli.push import file_list
from mlx_esm_hf.cli.running import reporting_errors
from mlx_esm_hf.errors import UserError

QUANTIZATION = "Quantization"


def command(
    source: Annotated[
        str,
        typer.Argument(
            help="Hub id or folder of the checkpoint; demo is the small model bundled with the package.",
            callback=opt.model_or_demo,
        ),
    ],
    output_dir: Annotated[Path, typer.Argument(help="Folder to write; it must be empty or not exist.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16, for weights that are not quantized. Default: unchanged."),
    ] = None,
    quantize: Annotated[
        bool, typer.Option("--quantize", "-q", help="Quantize the encoder's layers.", rich_help_panel=QUANTIZATION)
    ] = False,
    bits: Annotated[
        int | None,
        typer.Option(
            "--bits",
            "--q-bits",
            help="Bits per weight: 2, 3, 4, 5, 6 or 8. Default: 4.",
            min=2,
            max=8,
            rich_help_panel=QUANTIZATION,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            "--q-group-size",
            help="Weights that share a scale: 32, 64 or 128. Default: 64; 32 with --activation-dtype.",
            min=16,
            max=128,
            rich_help_panel=QUANTIZATION,
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            "--q-mode",
            help="affine (default), or mxfp4, mxfp8 or nvfp4, which fix bits and group size.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = None,
    activation_dtype: Annotated[
        str | None,
        typer.Option(
            help="int8: also round the inputs of quantized layers, for 4 and 8 bits; faster on a CPU.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="PATTERN=HOW for layers whose path matches the pattern: bits (affine), a mode, or full for full "
            "precision. Repeatable; the last match counts.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = None,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize", "-d", help="Turn a quantized checkpoint into a plain one.", rich_help_panel=QUANTIZATION
        ),
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a weights file.")] = "5GB",
    revision: opt.Revision = None,
    report: Annotated[
        str | None,
        typer.Option(help="FASTA file: compare source and result on these proteins (memory, speed, answers)."),
    ] = None,
    upload_repo: Annotated[
        str | None, typer.Option(help="Hub repository to publish the result in, as mlx-esm push does.")
    ] = None,
) -> None:
    """Convert a checkpoint to another precision: cast, quantize or dequantize.

    Embeddings and heads are not quantized unless a --rule says so. Without options the checkpoint is rewritten as
    safetensors.

    Example: mlx-esm convert facebook/esm2_t33_650M_UR50D esm2-650M-4bit --quantize --bits 4 --rule "lm_head.*=8"
    """
    with reporting_errors(lambda: f"Stopped. {output_dir} is complete or does not exist."):
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
        for line in file_list(conversion.publication):
            typer.echo(line)


def parse_rule(text: str) -> tuple[str, int | str | None]:
    """Return the pattern and the precision of a rule such as "lm_head.*=8"; None stands for full precision.

    Raises:
        UserError: the text is not PATTERN=HOW.
    """
    pattern, sign, how = text.rpartition("=")
    if not (pattern and sign and how):
        raise UserError(f"--rule must be PATTERN=HOW such as lm_head.*=8, got {text}.")
    if how == "full":
        return pattern, None
    return pattern, int(how) if re.fullmatch(r"[0-9]{1,9}", how) else how
