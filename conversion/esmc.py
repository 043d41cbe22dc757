"""The open weights of ESMC, in the layout of the `esm` package, become a folder in that of Hugging Face.

    python conversion/esmc.py esmc_300m_2024_12_v0.pth ESMC-300M

Nothing in the file is executed, and neither torch nor esm is needed. Weights keep their dtype.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mlx.core as mx

from mlx_esm_hf import EsmcTokenizer, MLXEsmcConfig, MLXEsmcForMaskedLM
from mlx_esm_hf.checkpoint.torch_bin import load_torch_bin
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.models.esmc.names import SEPARATED

HEAD_DIM = 64  # in every model that was published; the shapes of weights do not tell
BLOCKS = "transformer.blocks."  # before the numbers of layers


def convert(checkpoint: Path, output: Path) -> MLXEsmcForMaskedLM:
    """Write `config.json`, `model.safetensors` and the files of the tokenizer into the folder `output`.

    Returns:
        The model.

    Raises:
        CheckpointError: a damaged or hostile file, or not all weights of an ESMC.
        OSError: a file cannot be read or written.
    """
    state = load_torch_bin(checkpoint)
    model = MLXEsmcForMaskedLM(make_config(state, checkpoint))
    model.to(state["embed.weight"].dtype)
    try:
        model.load_state_dict(separated(state))
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    output.mkdir(parents=True, exist_ok=True)
    EsmcTokenizer().save_pretrained(output)
    model.save_pretrained(output)
    return model


def make_config(state: dict[str, mx.array], checkpoint: Path) -> MLXEsmcConfig:
    """
    Raises:
        CheckpointError: these are not the weights of an ESMC.
    """
    layers = {key.split(".")[2] for key in state if key.startswith(BLOCKS)}
    try:
        vocab_size, hidden_size = state["embed.weight"].shape
        _, intermediate_size = state[f"{BLOCKS}0.ffn.3.weight"].shape
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} does not hold the weights of an ESMC ({error}).") from error
    if hidden_size % HEAD_DIM:
        raise CheckpointError(f"{checkpoint} is {hidden_size} wide; the heads of ESMC are {HEAD_DIM} each.")
    return MLXEsmcConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=hidden_size // HEAD_DIM,
        intermediate_size=intermediate_size,
    )


def separated(state: dict[str, mx.array]) -> dict[str, mx.array]:
    """The weights with the matrices that were one as several, under their names here; the others as they are."""
    found = {}
    for key, array in state.items():
        ending = next((ending for ending in SEPARATED if key.endswith(ending)), None)
        if ending is None:
            found[key] = array
            continue
        layer = key.removeprefix(BLOCKS).removesuffix(ending)
        names = SEPARATED[ending]
        if array.shape[0] % len(names):
            raise CheckpointError(f"{key} has {array.shape[0]} rows, which are no {len(names)} matrices.")
        for name, part in zip(names, mx.split(array, len(names)), strict=True):
            found[f"layers.{layer}.{name}.weight"] = part
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert the open weights of ESMC into the layout of Hugging Face.")
    parser.add_argument("checkpoint", type=Path, help="a .pth file")
    parser.add_argument("output", type=Path, help="a folder")
    options = parser.parse_args()
    try:
        model = convert(options.checkpoint, options.output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.output}: {model.num_parameters():,} parameters, {str(model.dtype).rpartition('.')[2]}")


if __name__ == "__main__":
    main()
