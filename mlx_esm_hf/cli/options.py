"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_esm_hf.errors import UserError

Fasta = Annotated[
    str, typer.Argument(help="Proteins in FASTA, plain, gzipped or zstandard-compressed; - for standard input.")
]
OptionalFasta = Annotated[
    str | None, typer.Argument(help="Proteins in FASTA, plain, gzipped or zstandard-compressed; - for standard input.")
]


def model_or_demo(model: str | None) -> str | None:
    """The model of --model; of "demo" the folder of the one that comes with the package."""
    if model != "demo":
        return model
    from mlx_esm_hf.demo import demo_model

    return demo_model()


def models_or_demo(models: list[str]) -> list[str]:
    """The same of several."""
    return [model_or_demo(model) or "" for model in models]


MODEL = "A model on the Hub, or a folder; demo, the small one that comes with the package."
Model = Annotated[str, typer.Option(help=MODEL, callback=model_or_demo)]
Models = Annotated[list[str], typer.Option(help=f"{MODEL} Once for each of several.", callback=models_or_demo)]
OptionalModel = Annotated[str | None, typer.Option(help=f"{MODEL} It is trained further.", callback=model_or_demo)]
Output = Annotated[Path, typer.Option(help="What to write: a file, by its suffix, or a folder of shards.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; by default what suits the device.")]
Activations = Annotated[
    str | None,
    typer.Option(help="int8: round what quantized layers of 4 or 8 bits are given to 8 bits, too; faster on a CPU."),
]
Device = Annotated[str | None, typer.Option(help="cpu or gpu; by default MLX's own choice.")]
Long = Annotated[
    str, typer.Option(help="Proteins beyond the position table: error, truncate, or window (overlapping, blended).")
]
BatchTokens = Annotated[
    str, typer.Option(help="Most tokens that go through the model together; auto: as many as fit into memory.")
]
Aligned = Annotated[bool, typer.Option("--aligned", help="Keep gaps (- and .), which are dropped otherwise.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at a bad record instead of leaving it out.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]


def tokens_of(batch_tokens: str) -> int | None:
    """The number that --batch-tokens gives; None for auto.

    Raises:
        ValueError: it is neither.
    """
    if batch_tokens == "auto":
        return None
    if not batch_tokens.isdecimal() or int(batch_tokens) < 1:
        raise UserError(f"--batch-tokens {batch_tokens}: auto, or a number of tokens, is needed.")
    return int(batch_tokens)


def listed(text: str) -> list[str]:
    """The entries of a list like "mean,cls"."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]
