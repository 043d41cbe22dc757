"""Options shared by several commands, each defined once. A panel is a heading in `--help`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mlx_esm_hf.checks import MOST, MOST_SEED, check_number
from mlx_esm_hf.errors import UserError

# Panels of --help
LOADING = "Loading the model"
COMPUTING = "Computing"
INPUT = "Reading proteins"
DATA = "Data"
ADAPTERS = "Adapters"
OPTIMIZATION = "Optimization"
SAVING = "Evaluating, saving and logging"


def number(
    low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf, below: float = math.inf
) -> Callable[[float], float]:
    """Return a callback that refuses NaN, infinity and numbers outside bounds; see `check_number`.

    typer's own `min` and `max` accept NaN.
    """

    def check(value: float) -> float:
        try:
            check_number("", value, low, high, above=above, below=below)
        except UserError as error:
            raise typer.BadParameter(str(error).strip()) from None
        return value

    return check


def model_or_demo(model: str | None) -> str | None:
    """Return the value of --model, with "demo" replaced by the folder of the bundled model."""
    if model != "demo":
        return model
    from mlx_esm_hf.demo import demo_model

    return demo_model()


def models_or_demo(models: list[str]) -> list[str]:
    """Apply `model_or_demo` to each value of --model."""
    return [model_or_demo(model) or "" for model in models]


# Proteins

FASTA = "Proteins in FASTA, plain, gzipped or zstandard-compressed; - reads standard input."
Fasta = Annotated[str, typer.Argument(help=FASTA)]
OptionalFasta = Annotated[str | None, typer.Argument(help=FASTA)]
Aligned = Annotated[
    bool, typer.Option("--aligned", help="Keep gaps (- and .), which are dropped by default.", rich_help_panel=INPUT)
]
Structure = Annotated[
    Path | None,
    typer.Option(
        help="Structure letters for SaProt's models, by id: a table of foldseek structureto3didescriptor, or FASTA.",
        rich_help_panel=INPUT,
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Stop at an invalid record instead of leaving it out.", rich_help_panel=INPUT)
]
Long = Annotated[
    str,
    typer.Option(
        help="Proteins longer than the model's position table: error, truncate, or window (overlapping windows, "
        "blended).",
        rich_help_panel=INPUT,
    ),
]

# Models

MODEL = "Hub id or folder of a model; demo is the small model bundled with the package."
MODEL_NAMES = ("--model", "-m")
Model = Annotated[str, typer.Option(*MODEL_NAMES, help=MODEL, callback=model_or_demo)]
Models = Annotated[
    list[str], typer.Option(*MODEL_NAMES, help=f"{MODEL} Repeat for several models.", callback=models_or_demo)
]
OptionalModel = Annotated[
    str | None, typer.Option(*MODEL_NAMES, help=f"{MODEL} Continue training it.", callback=model_or_demo)
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.", rich_help_panel=LOADING)]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, float16 or bfloat16. Default: the checkpoint's on a GPU, float32 on a CPU.",
        rich_help_panel=LOADING,
    ),
]
ActivationDtype = Annotated[
    str | None,
    typer.Option(
        help="int8: also round the inputs of quantized layers of 4 or 8 bits; faster on a CPU.", rich_help_panel=LOADING
    ),
]

# Computing

OUTPUT_NAMES = ("--output", "-o")
Output = Annotated[
    Path, typer.Option(*OUTPUT_NAMES, help="File to write, in the format of its suffix, or a folder of shards.")
]
Device = Annotated[str | None, typer.Option(help="cpu or gpu. Default: MLX's choice.", rich_help_panel=COMPUTING)]
BatchTokens = Annotated[
    str,
    typer.Option(help="Maximum tokens per batch; auto: as many as fit into memory.", rich_help_panel=COMPUTING),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", help="Print only errors; records that are left out are listed in OUTPUT.left_out.txt."),
]

# Training

OutputFolder = Annotated[Path, typer.Option(*OUTPUT_NAMES, help="Folder for the model, its checkpoints and the log.")]
Accumulate = Annotated[
    int, typer.Option(help="Batches per optimizer step.", min=1, max=MOST, rich_help_panel=OPTIMIZATION)
]
Steps = Annotated[
    int | None,
    typer.Option(
        help="Optimizer steps. Default: as many as the epochs have.", min=1, max=MOST, rich_help_panel=OPTIMIZATION
    ),
]
Epochs = Annotated[
    float,
    typer.Option(help="Passes over the data.", callback=number(above=0, high=MOST), rich_help_panel=OPTIMIZATION),
]
LearningRate = Annotated[
    float, typer.Option(help="Peak learning rate.", callback=number(0), rich_help_panel=OPTIMIZATION)
]
Schedule = Annotated[
    str,
    typer.Option(
        help="Learning rate schedule: linear, cosine, constant or constant_with_warmup.", rich_help_panel=OPTIMIZATION
    ),
]
Warmup = Annotated[
    float,
    typer.Option(
        help="Warm-up steps; a value below 1 is a fraction of all steps.",
        callback=number(0, MOST),
        rich_help_panel=OPTIMIZATION,
    ),
]
WeightDecay = Annotated[
    float,
    typer.Option(
        help="AdamW's weight decay, for all parameters except biases and layer norms.",
        callback=number(0),
        rich_help_panel=OPTIMIZATION,
    ),
]
Clip = Annotated[
    float,
    typer.Option(help="Maximum gradient norm; 0 turns clipping off.", callback=number(0), rich_help_panel=OPTIMIZATION),
]
Bf16 = Annotated[
    bool,
    typer.Option("--bf16", help="Compute in bfloat16 with float32 weights; for a GPU.", rich_help_panel=OPTIMIZATION),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        help="Recompute activations for the gradient: less memory, a third more time.",
        rich_help_panel=OPTIMIZATION,
    ),
]
Seed = Annotated[int, typer.Option(help="Random seed. Equal seeds give equal models.", min=0, max=MOST_SEED)]
Keep = Annotated[int, typer.Option(help="Number of checkpoints to keep.", min=1, max=MOST, rich_help_panel=SAVING)]
LogEvery = Annotated[
    int, typer.Option(help="Steps between lines of log.jsonl.", min=1, max=MOST, rich_help_panel=SAVING)
]
Picture = Annotated[
    Path | None, typer.Option(help="Plot the losses to a .png, .svg or .pdf file.", rich_help_panel=SAVING)
]


def parse_batch_tokens(text: str) -> int | None:
    """Return the value of --batch-tokens as a number, or None for "auto".

    Raises:
        UserError: the value is neither.
    """
    if text == "auto":
        return None
    if not (text.isascii() and text.isdecimal()) or len(text) > 10 or not 1 <= int(text) <= MOST:
        raise UserError(f"--batch-tokens must be auto or a positive integer up to {MOST}, got {text or 'nothing'}.")
    return int(text)


def parse_list(text: str) -> list[str]:
    """Return the entries of a comma-separated list such as "mean,cls"."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]
