"""Convert weights of the first MLX port, mlx-esm (https://github.com/usmanm/mlx-esm), for this library.

    python conversion/mlx_esm_npz.py weights/esm1-202402151405.npz mlx-esm

Its network is ESM-1 with its own alphabet and a few differences, which `MLXEsm1Config` describes. mlx-esm does not mask
padding in attention and this library does, so outputs agree for single sequences only.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path

import numpy as np

from mlx_esm_hf import Esm1Tokenizer, MLXEsm1Config, MLXEsmForMaskedLM
from mlx_esm_hf.checkpoint.names import Dialect
from mlx_esm_hf.checkpoint.write import stale_weights
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.runtime.files import replace_files

# Padding, end, mask, two gaps, unknown, residues, start.
ALPHABET = "%$*-.?ABCDEFGHIKLMNOPQRSTUVWXYZ^"
HEADS = 4  # of all its models; it cannot be derived from the shapes of the weights

NAMES = Dialect(
    renames=(
        ("embed_tokens.weight", "embeddings.word_embeddings.weight"),
        ("{module}self_attn.query_proj.{rest}", "{module}attention.self.query.{rest}"),
        ("{module}self_attn.key_proj.{rest}", "{module}attention.self.key.{rest}"),
        ("{module}self_attn.value_proj.{rest}", "{module}attention.self.value.{rest}"),
        ("{module}self_attn.out_proj.{rest}", "{module}attention.output.dense.{rest}"),
        ("{module}self_attn_layer_norm.{rest}", "{module}attention.LayerNorm.{rest}"),
        ("{module}fc1.{rest}", "{module}intermediate.dense.{rest}"),
        ("{module}fc2.{rest}", "{module}output.dense.{rest}"),
        ("{module}final_layer_norm.{rest}", "{module}LayerNorm.{rest}"),
        ("out.weight", "lm_head.decoder.weight"),
        ("out.bias", "lm_head.bias"),
    )
)
LAYERS = "transformer_layers.layers."  # prefix of the layer numbers; ours is "encoder.layer."


def convert(weights: Path, output: Path) -> MLXEsmForMaskedLM:
    """Write `config.json`, `model.safetensors` and the tokenizer files into the folder `output`.

    Returns:
        The model. It has no contact head: its `esm.contact_head` is None.

    Raises:
        CheckpointError: the file is damaged, contains pickled objects, or is not a complete network of mlx-esm.
        OSError: a file cannot be read or written.
    """
    state = read_weights(weights)
    model = MLXEsmForMaskedLM(make_config(state, weights))
    model.esm.contact_head = None
    names = {key: (NAMES.ours(key) or key).replace(LAYERS, "encoder.layer.") for key in state}
    try:
        model.load_state_dict({names[key]: array for key, array in state.items()})
    except RuntimeError as error:
        raise CheckpointError(f"{weights}: {error}") from error
    with replace_files(output, stale_weights()) as folder:
        write_tokenizer(folder)
        model.save_pretrained(folder)
    return model


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Read an `.npz` file of arrays.

    Raises:
        CheckpointError: it is damaged or contains pickled objects.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (
        AttributeError,
        EOFError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:  # as raised for files that are not .npz
        raise CheckpointError(
            f"{path} is not an .npz file of plain arrays ({error}). No code from it was run."
        ) from error


def make_config(state: dict[str, np.ndarray], path: Path) -> MLXEsm1Config:
    """Return the config that fits the weights.

    Raises:
        CheckpointError: they are not those of mlx-esm.
    """
    layers = {key.split(".")[2] for key in state if key.startswith(LAYERS)}
    try:
        (tokens, hidden_size), (intermediate_size, _) = (
            state[key].shape for key in ("embed_tokens.weight", f"{LAYERS}0.fc1.weight")
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} does not contain the weights of mlx-esm's ESM1 ({error}).") from error
    if tokens != len(ALPHABET):
        raise CheckpointError(f"{path}: expected {len(ALPHABET)} tokens, as in the alphabet of mlx-esm, got {tokens}.")
    return MLXEsm1Config(
        vocab_size=len(ALPHABET),
        vocab_list=list(ALPHABET),
        pad_token_id=ALPHABET.index("%"),
        mask_token_id=ALPHABET.index("*"),
        bos_token_id=ALPHABET.index("^"),
        eos_token_id=ALPHABET.index("$"),
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=HEADS,
        intermediate_size=intermediate_size,
        token_dropout=False,
        scale_embedding=False,
        add_bias_kv=False,
    )


def write_tokenizer(output: Path) -> None:
    """Write the tokenizer of mlx-esm into a folder."""
    vocabulary = output / "vocab.txt"
    vocabulary.write_text("\n".join(ALPHABET), encoding="utf-8")
    special = {"pad_token": "%", "eos_token": "$", "mask_token": "*", "unk_token": "?", "cls_token": "^"}
    Esm1Tokenizer(vocabulary, **special).save_pretrained(output)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Convert weights of mlx-esm to a Hugging Face folder.")
    parser.add_argument("weights", type=Path, help="an .npz file")
    parser.add_argument("output", type=Path, help="the folder to write")
    options = parser.parse_args()
    try:
        model = convert(options.weights, options.output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.output}: {model.num_parameters():,} parameters. It has no contact head: loading reports this.")


if __name__ == "__main__":
    main()
