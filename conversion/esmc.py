"""Convert the open weights of ESMC from the layout of the `esm` package to a Hugging Face folder.

    python conversion/esmc.py esmc_300m_2024_12_v0.pth ESMC-300M

No code from the file is run, and neither torch nor esm is needed. Weights keep their dtype.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mlx.core as mx

from mlx_esm_hf import EsmcTokenizer, MLXEsmcConfig, MLXEsmcForMaskedLM
from mlx_esm_hf.checkpoint.torch_bin import load_torch_bin
from mlx_esm_hf.checkpoint.write import stale_weights
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.models.esmc.names import SEPARATED
from mlx_esm_hf.runtime.files import replace_files

HEAD_DIM = 64  # of all published models; it cannot be derived from the shapes of the weights
BLOCKS = "transformer.blocks."  # prefix of the layer numbers


def convert(checkpoint: Path, output: Path) -> MLXEsmcForMaskedLM:
    """Write `config.json`, `model.safetensors` and the tokenizer files into the folder `output`.

    Returns:
        The model.

    Raises:
        CheckpointError: the file is damaged or malicious, or is not a complete ESMC.
        OSError: a file cannot be read or written.
    """
    state = load_torch_bin(checkpoint)
    model = MLXEsmcForMaskedLM(make_config(state, checkpoint))
    model.to(state["embed.weight"].dtype)
    try:
        model.load_state_dict(separated(state))
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    with replace_files(output, stale_weights()) as folder:
        EsmcTokenizer().save_pretrained(folder)
        model.save_pretrained(folder)
    return model


def make_config(state: dict[str, mx.array], checkpoint: Path) -> MLXEsmcConfig:
    """Return the config that fits the weights.

    Raises:
        CheckpointError: they are not those of an ESMC.
    """
    layers = {key.split(".")[2] for key in state if key.startswith(BLOCKS)}
    try:
        vocab_size, hidden_size = state["embed.weight"].shape
        _, intermediate_size = state[f"{BLOCKS}0.ffn.3.weight"].shape
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} does not contain the weights of an ESMC ({error}).") from error
    if hidden_size % HEAD_DIM:
        raise CheckpointError(f"{checkpoint}: the hidden size must be a multiple of {HEAD_DIM}, got {hidden_size}.")
    return MLXEsmcConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=hidden_size // HEAD_DIM,
        intermediate_size=intermediate_size,
    )


def separated(state: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return the weights with fused matrices split and renamed. Other weights are unchanged."""
    found = {}
    for key, array in state.items():
        suffix = next((suffix for suffix in SEPARATED if key.endswith(suffix)), None)
        if suffix is None:
            found[key] = array
            continue
        layer = key.removeprefix(BLOCKS).removesuffix(suffix)
        names = SEPARATED[suffix]
        if array.shape[0] % len(names):
            raise CheckpointError(
                f"{key}: the number of rows must be a multiple of {len(names)}, got {array.shape[0]}."
            )
        for name, part in zip(names, mx.split(array, len(names)), strict=True):
            found[f"layers.{layer}.{name}.weight"] = part
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Convert the open weights of ESMC to a Hugging Face folder.")
    parser.add_argument("checkpoint", type=Path, help="a .pth file")
    parser.add_argument("output", type=Path, help="the folder to write")
    options = parser.parse_args()
    try:
        model = convert(options.checkpoint, options.output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.output}: {model.num_parameters():,} parameters, {str(model.dtype).rpartition('.')[2]}")


if __name__ == "__main__":
    main()
