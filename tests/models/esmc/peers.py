"""The same small ESMC in MLX and torch, like `tests/parity.py` for ESM."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import mlx_esm_hf
from tests.parity import HEADS, LENGTHS, Answers, Peers, as_numpy, batch, for_torch, hold, randomize

# Sizes that are not multiples of the kernels' vectors, and different numbers of heads.
SIZES = (
    {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 72},
    {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 160},
    {"hidden_size": 40, "num_hidden_layers": 4, "num_attention_heads": 5, "intermediate_size": 100},
)


def config(head: str = "lm", **overrides: Any) -> transformers.EsmcConfig:
    size = SIZES[list(HEADS).index(head) % len(SIZES)]
    return transformers.EsmcConfig(**{"classifier_dropout": 0.0, **size, **HEADS[head][1], **overrides})


def torch_model(head: str = "lm", **overrides: Any) -> Any:
    """Return a model of transformers in which every parameter differs from its initial value."""
    model = getattr(transformers, f"Esmc{HEADS[head][0]}")(config(head, **overrides)).eval()
    model.set_attn_implementation("eager")
    randomize(model, seed=len(head))
    return model


def peers(folder: Path, head: str = "lm", **overrides: Any) -> Peers:
    """Return a model that transformers saved, and the same model loaded in MLX."""
    model = torch_model(head, **overrides)
    model.save_pretrained(folder)
    mlx = getattr(mlx_esm_hf, f"MLXEsmc{HEADS[head][0]}").from_pretrained(folder)
    return Peers(mlx, model, copy.deepcopy(model).double())


def chain_batch(head: str = "model", seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> dict[str, np.ndarray]:
    """Return a batch of `parity.batch` with one to four chains per row, two of which are not contiguous."""
    inputs = batch("right", seed=seed, head=head, lengths=lengths)
    real = inputs.pop("attention_mask").astype(bool)
    columns = np.arange(real.shape[1])
    rows = [columns // max(1, length // (1 + row % 4)) for row, length in enumerate(lengths)]
    chains = np.array(rows)
    chains[2] = columns % 3
    chains[3, :2] = 7  # chain ids are not sorted
    inputs["sequence_id"] = np.where(real, chains, -1)
    return inputs


def real_tokens(inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Return the mask of real tokens, bool [B, L]."""
    if "sequence_id" in inputs:
        return inputs["sequence_id"] >= 0
    return inputs.get("attention_mask", np.ones(inputs["input_ids"].shape)).astype(bool)


def answers(model: Any, inputs: dict[str, np.ndarray], attentions: bool = True) -> Answers:
    """Return a model's outputs at real tokens: {output: [array] or the arrays of all layers}."""
    arrays = for_torch(inputs, model) if isinstance(model, torch.nn.Module) else inputs
    with torch.no_grad():
        output = dict(model(**arrays, output_hidden_states=True, output_attentions=attentions))
    real = real_tokens(inputs)
    found: Answers = {}
    for name, value in output.items():
        layers = [as_numpy(x) for x in (value if isinstance(value, tuple) else (value,))]
        if name == "attentions":  # from real queries to all keys
            layers = [x.swapaxes(1, 2)[real] for x in layers]
        elif layers[0].shape[:2] == real.shape and layers[0].ndim == 3:
            layers = [x[real] for x in layers]
        found[name] = layers
    return found


def hold_answers(
    model: Peers, title: str, inputs: dict[str, Any], theirs: Answers, float64: Answers, **how: str
) -> None:
    """Compare all outputs with float64 and torch's error, with attentions and with fused attention."""
    complete, brief = answers(model.mlx, inputs), answers(model.mlx, inputs, attentions=False)
    assert complete.keys() == theirs.keys() == brief.keys() | {"attentions"}
    for ours in complete, brief:
        for name, layers in ours.items():
            for layer in zip(layers, theirs[name], float64[name], strict=True):
                hold(title, name, "ESMC", *layer, **how)
