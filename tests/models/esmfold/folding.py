"""A small folding model of transformers with weights that make every part count, and the same model in MLX.

A freshly initialized model would test little: its biases are zero, its norms the identity, and all residues lie within
a few Å.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import EsmConfig, EsmForProteinFolding

from mlx_esm_hf import MLXEsmForProteinFolding
from tests.tiny import tiny_folding


def perturb(model: Any, seed: int = 0) -> Any:
    """Set random weights that keep the scale of the states, with no weight 0 or 1, and return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("head_weights"):
                values = 0.54 + 0.3 * values
            elif "embedding" in name or "recycle_disto" in name:
                values = 0.5 * values
            elif parameter.ndim == 2:
                values = values / parameter.shape[1] ** 0.5
            elif name.endswith("bias"):
                values = 0.1 * values
            elif name != "esm_s_combine":
                values = 1 + 0.2 * values
            parameter.copy_(values)
    return model


class Peers(NamedTuple):
    """Three models with the same weights."""

    ours: Any
    theirs: Any
    float64: Any
    folder: Path


def peers(folder: Path, **overrides: Any) -> Peers:
    """Save a model of transformers in `folder` and load it in MLX; `overrides` are those of `tiny_folding`."""
    theirs = perturb(EsmForProteinFolding(EsmConfig(**tiny_folding(**overrides))).eval())
    theirs.save_pretrained(folder)
    ours = MLXEsmForProteinFolding.from_pretrained(folder)
    return Peers(ours, theirs, copy.deepcopy(theirs).double(), folder)


def residues(lengths: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return residues (one of them X), a mask with padding on the right, and positions with jumps, [B, L] each."""
    random = np.random.default_rng(seed)
    B, L = len(lengths), max(lengths)
    mask = (np.arange(L) < np.array(lengths)[:, None]).astype(np.int64)
    ids = random.integers(0, 20, (B, L))
    ids[:, L // 2] = 20 if L > 1 else ids[:, 0]
    jumps = (np.arange(L) >= 2 * L // 3) * random.integers(3, 9, (B, 1))
    return ids * mask, mask, (np.arange(L) + jumps).astype(np.int64)
