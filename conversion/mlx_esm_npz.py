"""Weights of the first MLX port, mlx-esm (https://github.com/usmanm/mlx-esm), become a folder that this library loads.

    python conversion/mlx_esm_npz.py weights/esm1-202402151405.npz mlx-esm

Its network is ESM-1 with a few differences, all of which `MLXEsm1Config` has a field for, and an alphabet of its own.
It did not mask padding in attention, which this library does: single sequences have the same answers.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path

import numpy as np

from mlx_esm_hf import Esm1Tokenizer, MLXEsm1Config, MLXEsmForMaskedLM
from mlx_esm_hf.checkpoint.names import Dialect
from mlx_esm_hf.errors import CheckpointError

# Padding, end, mask, two gaps, unknown, residues, start.
ALPHABET = "%$*-.?ABCDEFGHIKLMNOPQRSTUVWXYZ^"
HEADS = 4  # in every model that it makes; the shapes of weights do not tell

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
LAYERS = "transformer_layers.layers."  # before their numbers; here it is "encoder.layer."


def convert(weights: Path, output: Path) -> MLXEsmForMaskedLM:
    """Write `config.json`, `model.safetensors` and the files of the tokenizer into the folder `output`.

    Returns:
        The model. It has no contact head: its `esm.contact_head` is None.

    Raises:
        CheckpointError: a damaged file, one with pickled objects in it, or not all weights of such a network.
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
    write_tokenizer(output)
    model.save_pretrained(output)
    return model


def read_weights(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (AttributeError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:  # or it is no .npz
        raise CheckpointError(f"{path} is not an .npz file of plain arrays ({error}). Nothing was executed.") from error


def make_config(state: dict[str, np.ndarray], path: Path) -> MLXEsm1Config:
    layers = {key.split(".")[2] for key in state if key.startswith(LAYERS)}
    try:
        (tokens, hidden_size), (intermediate_size, _) = (
            state[key].shape for key in ("embed_tokens.weight", f"{LAYERS}0.fc1.weight")
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold the weights of mlx-esm's ESM1 ({error}).") from error
    if tokens != len(ALPHABET):
        raise CheckpointError(f"{path} has {tokens} tokens, and the alphabet of mlx-esm {len(ALPHABET)}.")
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
    output.mkdir(parents=True, exist_ok=True)
    vocabulary = output / "vocab.txt"
    vocabulary.write_text("\n".join(ALPHABET), encoding="utf-8")
    special = {"pad_token": "%", "eos_token": "$", "mask_token": "*", "unk_token": "?", "cls_token": "^"}
    Esm1Tokenizer(vocabulary, **special).save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert weights of mlx-esm into the layout of Hugging Face.")
    parser.add_argument("weights", type=Path, help="an .npz file")
    parser.add_argument("output", type=Path, help="a folder")
    options = parser.parse_args()
    try:
        model = convert(options.weights, options.output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.output}: {model.num_parameters():,} parameters. It has no contact head: loading it says so.")


if __name__ == "__main__":
    main()
