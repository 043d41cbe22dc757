"""Compare a converted model with the original on real proteins.

    python conversion/check.py esm2_t6_8M_UR50D esm2_t6_8M_UR50D.pt
    python conversion/check.py mlx-esm weights/esm1-202402151405.npz
    python conversion/check.py ESMC-300M esmc_300m_2024_12_v0.pth

Checking a `.pt` file loads it with fair-esm and torch (`pip install fair-esm torch`), which can run arbitrary code.
Only check files you trust. Converting a file runs no code from it. The original of an `.npz` file is
mlx-esm's network, that of a `.pth` file is ESMC's. Both are implemented below in NumPy and computed in float64.

Both models see one protein at a time. The table shows each output's largest difference over all proteins, and the
scale of the output: its largest absolute value. The exit code is 0 if every difference is at most 1e-4 of the scale,
and 1 otherwise.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from transformers import AutoTokenizer

from mlx_esm_hf import EsmcTokenizer, MLXAutoModelForMaskedLM
from mlx_esm_hf.checkpoint.torch_bin import load_torch_bin
from mlx_esm_hf.data.source import read_proteins

# Relative to the scale of an output. Two correct float32 implementations differ by about 1e-6, wrong ones by far more.
BAR = 1e-4
LONGEST = 1022  # residues, the limit of ESM-1b and ESM-1v; longer proteins are truncated

Outputs = dict[str, np.ndarray]  # {name: [tokens, ...], or [residues, residues] for contacts}
Original = Callable[[str], tuple[list[int], Outputs]]  # from a sequence to (token ids, outputs)


def converted_outputs(model: Any, ids: list[int], contacts: bool) -> Outputs:
    """Return the outputs of the converted model for one protein."""
    output: Any = model([ids], output_hidden_states=True)
    arrays = {"logits": output.logits, **{f"layer {i}": x for i, x in enumerate(output.hidden_states)}}
    if contacts:
        arrays["contacts"] = model.predict_contacts([ids], [[1] * len(ids)])
    return {name: np.array(array[0]) for name, array in arrays.items()}


def load_fair_esm(path: Path) -> Original:
    """Load a model of fair-esm with fair-esm's own loader, which can run arbitrary code from the file."""
    import esm
    import torch

    def load(file: Path) -> Any:
        return torch.load(file, map_location="cpu", weights_only=False)

    regression = path.with_name(f"{path.stem}-contact-regression.pt")
    regression_data = load(regression) if regression.exists() else None
    model, alphabet = esm.pretrained.load_model_and_alphabet_core(path.stem, load(path), regression_data)
    to_tokens = alphabet.get_batch_converter()
    layers = range(model.eval().num_layers + 1)

    @torch.no_grad()
    def original(sequence: str) -> tuple[list[int], Outputs]:
        tokens = to_tokens([("", sequence)])[2]
        output = model(tokens, repr_layers=layers, return_contacts=regression_data is not None)
        tensors = {"logits": output["logits"]} | {f"layer {i}": output["representations"][i] for i in layers}
        if "contacts" in output:
            tensors["contacts"] = output["contacts"]
        return tokens[0].tolist(), {name: tensor[0].numpy() for name, tensor in tensors.items()}

    return original


def load_mlx_esm(path: Path) -> Original:
    """Load weights of mlx-esm for its network in NumPy."""
    with np.load(path, allow_pickle=False) as file:
        weights = {key: array.astype(np.float64) for key, array in file.items()}
    alphabet = "%$*-.?ABCDEFGHIKLMNOPQRSTUVWXYZ^"

    def original(sequence: str) -> tuple[list[int], Outputs]:
        ids = [alphabet.index(token) for token in f"^{sequence}$"]
        return ids, mlx_esm(weights, np.array(ids))

    return original


def mlx_esm(weights: dict[str, np.ndarray], ids: np.ndarray, heads: int = 4) -> Outputs:
    """Compute mlx-esm's network: token ids [L] to logits [L, 32] and the states before and after each layer, [L, D]."""

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def layer_norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-12)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(x: np.ndarray, name: str) -> np.ndarray:
        L, D = x.shape
        query, key, value = (
            linear(x, f"{name}.{kind}_proj").reshape(L, heads, D // heads).swapaxes(0, 1)
            for kind in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(1, 2) / math.sqrt(D // heads)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        context = scores / scores.sum(axis=-1, keepdims=True) @ value
        return linear(context.swapaxes(0, 1).reshape(L, D), f"{name}.out_proj")

    L, D = len(ids), weights["embed_tokens.weight"].shape[1]
    frequencies = np.exp(-np.arange(D // 2) * math.log(10000) / (D // 2 - 1))
    angles = np.arange(1, L + 1)[:, None] * frequencies
    positions = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    x = weights["embed_tokens.weight"][ids]
    x = x + positions.astype(x.dtype)
    outputs = {"layer 0": x}
    while f"transformer_layers.layers.{len(outputs) - 1}.fc1.weight" in weights:
        layer = f"transformer_layers.layers.{len(outputs) - 1}"
        x = x + attention(layer_norm(x, f"{layer}.self_attn_layer_norm"), f"{layer}.self_attn")
        x = x + linear(gelu(linear(layer_norm(x, f"{layer}.final_layer_norm"), f"{layer}.fc1")), f"{layer}.fc2")
        outputs[f"layer {len(outputs)}"] = x
    return {"logits": linear(x, "out"), **outputs}


def load_esmc(path: Path) -> Original:
    """Load published weights of ESMC for its network in NumPy."""
    weights = {
        key: np.array(array.astype(mx.float32)).astype(np.float64) for key, array in load_torch_bin(path).items()
    }
    tokenizer = EsmcTokenizer()

    def original(sequence: str) -> tuple[list[int], Outputs]:
        ids = tokenizer(sequence)["input_ids"]
        return ids, esmc(weights, np.array(ids))

    return original


def esmc(weights: dict[str, np.ndarray], ids: np.ndarray, head_dim: int = 64) -> Outputs:
    """Compute ESMC's network: token ids [L] to logits [L, 64] and the states before and after each layer, [L, D].

    The final layer norm is applied to the states after the last layer.
    """

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def layer_norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)

    def rotated(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x.reshape(len(x), -1, head_dim), 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).swapaxes(0, 1)

    def attention(x: np.ndarray, name: str) -> np.ndarray:
        query, key, value = np.split(linear(layer_norm(x, f"{name}.layernorm_qkv.0"), f"{name}.layernorm_qkv.1"), 3, -1)
        query, key = rotated(layer_norm(query, f"{name}.q_ln")), rotated(layer_norm(key, f"{name}.k_ln"))
        scores = query @ key.swapaxes(1, 2) / math.sqrt(head_dim)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        value = value.reshape(len(x), -1, head_dim).swapaxes(0, 1)
        context = scores / scores.sum(axis=-1, keepdims=True) @ value
        return linear(context.swapaxes(0, 1).reshape(x.shape), f"{name}.out_proj")

    def feed_forward(x: np.ndarray, name: str) -> np.ndarray:
        gate, up = np.split(linear(layer_norm(x, f"{name}.0"), f"{name}.1"), 2, axis=-1)
        return linear(gate / (1 + np.exp(-gate)) * up, f"{name}.3")

    frequencies = 10000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(len(ids))[:, None, None] * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    layers = len({key.split(".")[2] for key in weights if key.startswith("transformer.blocks.")})
    scaling = math.sqrt(layers / 36)
    x = weights["embed.weight"][ids]
    outputs = {"layer 0": x}
    for layer in range(layers):
        x = x + attention(x, f"transformer.blocks.{layer}.attn") / scaling
        x = x + feed_forward(x, f"transformer.blocks.{layer}.ffn") / scaling
        outputs[f"layer {layer + 1}"] = x
    x = outputs[f"layer {layers}"] = layer_norm(x, "transformer.norm")
    x = linear(x, "sequence_head.0")
    logits = linear(layer_norm(gelu(x), "sequence_head.2"), "sequence_head.3")
    return {"logits": logits, **outputs}


def gelu(x: np.ndarray) -> np.ndarray:
    """Return the exact GELU."""
    return x * (1 + np.vectorize(math.erf, otypes=[x.dtype])(x / math.sqrt(2))) / 2


LOADERS: dict[str, Callable[[Path], Original]] = {".npz": load_mlx_esm, ".pth": load_esmc}


def compare(converted: Path, original: Original, fasta: Path) -> dict[str, tuple[float, float]]:
    """Return {output: (largest difference over all proteins, scale)}.

    Raises:
        ValueError: the two models have different tokens for a protein, or outputs of different shapes.
    """
    model = MLXAutoModelForMaskedLM.from_pretrained(converted, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(converted)
    table: dict[str, tuple[float, float]] = {}
    for protein in read_proteins(fasta):
        sequence = protein.sequence[:LONGEST]
        ids, theirs = original(sequence)
        if tokenizer(sequence)["input_ids"] != ids:
            raise ValueError(f"{protein.id}: the converted tokenizer and the original give different tokens.")
        ours = converted_outputs(model, ids, "contacts" in theirs)
        if {name: x.shape for name, x in ours.items()} != {name: x.shape for name, x in theirs.items()}:
            raise ValueError(f"{protein.id}: the converted model and the original have different layers or sizes.")
        for name, x in theirs.items():
            largest, scale = table.get(name, (0.0, 0.0))
            table[name] = np.maximum(largest, np.abs(ours[name] - x).max()), np.maximum(scale, np.abs(x).max())
    return table


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description="Compare a converted model with the original on real proteins.",
        epilog="A .pt file is loaded by fair-esm, which can run arbitrary code from it: only check files you trust.",
    )
    parser.add_argument("converted", type=Path, help="the converted folder")
    parser.add_argument("original", type=Path, help="the .pt, .npz or .pth file it was converted from")
    parser.add_argument("--fasta", type=Path, default=Path(__file__).parents[1] / "examples" / "proteins.fasta")
    options = parser.parse_args()
    load = LOADERS.get(options.original.suffix, load_fair_esm)
    try:
        table = compare(options.converted, load(options.original), options.fasta)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if not table:
        sys.exit(f"error: {options.fasta} contains no proteins.")
    print(f"{'output':10} {'difference':>11} {'scale':>11} {'of scale':>9}")
    for name, (difference, scale) in table.items():
        print(f"{name:10} {difference:11.2e} {scale:11.2e} {difference / scale:9.1e}")
    # `<=` is False for NaN, so a NaN difference fails.
    passed = all(difference <= BAR * scale for difference, scale in table.values())
    print(f"{'Equal' if passed else 'DIFFERENT'}: the tolerance is {BAR:.0e} of the scale.")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
