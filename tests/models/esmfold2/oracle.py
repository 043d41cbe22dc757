"""transformers' ESMFold2 in float32 and float64, with random numbers that our model can use as well.

transformers fixes float32 in its source, so a `.double()` model is not a float64 oracle. `double_source` runs the same
source with float64 in place of float32.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import torch
from transformers import EsmFold2Config, EsmFold2Model

from mlx_esm_hf import MLXEsmFold2Model
from mlx_esm_hf.models.esmfold2.features import Msa, pad_features, protein_features
from mlx_esm_hf.models.esmfold2.sampler import Draws, capped_schedule
from tests.tiny import tiny_folding2

PACKAGE = "transformers.models.esmfold2"


@functools.cache
def double_source() -> Any:
    """Return transformers' modeling module with float64 in place of float32."""
    modules = {}
    for name in ("generation_esmfold2", "modeling_esmfold2"):
        path = importlib.import_module(f"{PACKAGE}.{name}").__file__
        source = Path(str(path)).read_text().replace("torch.float32", "torch.float64").replace(".float()", ".double()")
        for other in ("generation_esmfold2", "modeling_esmfold2"):
            source = source.replace(f"from .{other}", f"from .{other}_double")
        module = types.ModuleType(f"{PACKAGE}.{name}_double")
        module.__package__ = PACKAGE
        # Its decorator for docstrings reads the source file of the module.
        vars(module)["undocumented"] = lambda *given, **_: given[0] if given else (lambda made: made)
        sys.modules[module.__name__] = module
        exec(compile(source.replace("@auto_docstring", "@undocumented"), module.__name__, "exec"), vars(module))
        modules[name] = module
    return modules["modeling_esmfold2"]


def perturb(model: torch.nn.Module, seed: int = 0) -> Any:
    """Set random weights that keep the scale of the states, so that every part has an effect, and return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            if ".log_" in name:
                values = parameter + 0.3 * values
            elif "embed_tokens" in name or "dist_bin" in name:
                values = 0.5 * values
            elif parameter.ndim > 1:
                values = values / parameter.shape[1] ** 0.5
            elif name.endswith("bias"):
                values = 0.2 * values
            elif not name.endswith("layer_weights"):
                values = 1 + 0.2 * values
            parameter.copy_(values)
    return model


class Peers(NamedTuple):
    """Three models with the same weights."""

    ours: MLXEsmFold2Model
    theirs: Any
    float64: Any
    folder: Path


def peers(folder: Path, msa: bool = True, **overrides: Any) -> Peers:
    """Save a model of transformers in `folder` and load it in MLX; the arguments are those of `tiny_folding2`."""
    theirs = perturb(EsmFold2Model(EsmFold2Config(**tiny_folding2(msa, **overrides))).eval())
    theirs.save_pretrained(folder)
    float64 = double_source().EsmFold2Model(theirs.config).double().eval()
    float64.load_state_dict({name: x.double() for name, x in theirs.state_dict().items()})
    return Peers(MLXEsmFold2Model.from_pretrained(folder), theirs, float64, folder)


# Random numbers


@dataclass
class Recorded:
    """The random numbers of a fold in torch's order, for B proteins with S samples each; L and A include padding.

    Attributes:
        state: [B, L, L, C].
        keep: [B, L, L, C] of each loop, bool.
        start: [B · S, A, 3].
        steps: for each step, quaternions [B · S, 4], translations [B · S, 1, 3] and noise [B · S, A, 3].
    """

    state: torch.Tensor
    keep: list[torch.Tensor]
    start: torch.Tensor
    steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def record(config: Any, shape: tuple[int, int, int], samples: int, loops: int, steps: int, seed: int = 0) -> Recorded:
    """Draw the random numbers of `fold` after `torch.manual_seed(seed)`.

    Args:
        config: config of the model.
        shape: proteins, tokens and atoms of the batch, with padding.
        samples: S.
        loops: repetitions of the trunk, its first pass included.
        steps: `num_sampling_steps`.
        seed: the seed.
    """
    (B, L, A), C = shape, config.pairwise_hidden_size
    torch.manual_seed(seed)
    std = (2 / (5 * C)) ** 0.5
    state = torch.nn.init.trunc_normal_(torch.empty(B, L, L, C), 0.0, std, -3 * std, 3 * std)
    p, N = config.lm_encoder.lm_dropout, B * samples
    keep = [torch.nn.functional.dropout(torch.ones(B, L, L, C), p, training=True) > 0 for _ in range(loops)]
    start = torch.randn(N, A, 3)
    calls = len(capped_schedule(config.structure_head, steps))
    return Recorded(
        state, keep, start, [(torch.randn(N, 4), torch.randn(N, 1, 3), torch.randn(N, A, 3)) for _ in range(calls)]
    )


@contextlib.contextmanager
def replayed(recorded: Recorded, dtype: torch.dtype) -> Iterator[None]:
    """Make torch return recorded random numbers in place of its own."""
    normals = iter([recorded.start, *(x for step in recorded.steps for x in step)])
    masks = iter(recorded.keep)
    before = torch.randn, torch.randn_like, torch.nn.functional.dropout, torch.nn.init.trunc_normal_

    def dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return x * (next(masks).to(x.dtype) / (1 - p)) if training and p else x

    torch.randn = lambda *_, **__: next(normals).to(dtype)  # type: ignore[assignment]
    torch.randn_like = lambda _: next(normals).to(dtype)  # type: ignore[assignment]
    torch.nn.functional.dropout = dropout
    torch.nn.init.trunc_normal_ = lambda x, **_: x.copy_(recorded.state)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randn, torch.randn_like, torch.nn.functional.dropout, torch.nn.init.trunc_normal_ = before


class Replay(Draws):
    """Recorded random numbers for our model."""

    def __init__(self, recorded: Recorded, samples: int, atoms: list[int]):
        self.recorded, self.S, self.atoms = recorded, samples, atoms

    def _of(self, x: torch.Tensor, row: int, samples: range) -> np.ndarray:
        return x[row * self.S + samples.start : row * self.S + samples.stop].numpy()

    def state(self, width: int, std: float) -> mx.array:
        return mx.array(self.recorded.state.numpy())

    def keep(self, loop: int, width: int, p: float) -> mx.array:
        return mx.array(self.recorded.keep[loop].numpy())

    def start(self, row: int, samples: range) -> mx.array:
        return mx.array(self._of(self.recorded.start, row, samples)[:, : self.atoms[row]])

    def rotations(self, row: int, samples: range, step: int) -> mx.array:
        return mx.array(self._of(self.recorded.steps[step][0], row, samples))

    def translations(self, row: int, samples: range, step: int) -> mx.array:
        return mx.array(self._of(self.recorded.steps[step][1], row, samples))

    def noise(self, row: int, samples: range, step: int) -> mx.array:
        return mx.array(self._of(self.recorded.steps[step][2], row, samples)[:, : self.atoms[row]])


# Proteins


def alignment(chain: str, rows: int, seed: int = 0) -> Msa:
    """Return a random alignment of a chain, with gaps and insertions."""
    draw = np.random.default_rng(seed)
    query = protein_features(chain)["res_type"]
    residues = np.concatenate([query, draw.integers(1, 23, (rows - 1, len(chain)))])
    deletions = draw.integers(0, 3, residues.shape)
    deletions[0] = 0
    return Msa(residues, deletions, [""] * rows)


def batch(proteins: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return the features of {protein: rows of its chains' alignments} as one batch."""
    made = [
        protein_features(sequence, [alignment(chain, rows, i) for i, chain in enumerate(sequence.split(":"))])
        for sequence, rows in proteins.items()
    ]
    return {name: np.array(array) for name, array in pad_features(made).items()}


def as_torch(features: Mapping[str, np.ndarray], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return features as torch expects them: int64, bool and the dtype of the model."""
    kinds = {"i": torch.int64, "b": torch.bool, "f": dtype}
    return {name: torch.tensor(x).to(kinds[x.dtype.kind]) for name, x in features.items()}
