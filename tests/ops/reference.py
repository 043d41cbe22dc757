"""What the kernels compute, written with torch, and comparisons with it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from mlx_esm_hf.ops import kernels
from tests.bar import hold_to_bar

native = kernels.native

EPS = 1e-5
RAGGED = [0, 1, 1, 18, 300]  # offsets of sequences, one of which is empty
F = torch.nn.functional
ACTIVATIONS = {None: lambda x: x, "gelu": torch.nn.functional.gelu, "relu": torch.nn.functional.relu}


def numbers(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def tensor(x: Any, dtype: torch.dtype) -> Any:
    return torch.tensor(x, dtype=dtype) if isinstance(x, np.ndarray) and x.dtype == np.float32 else x


def evaluated(x: Any) -> Any:
    """Return an argument for the kernels; an array is evaluated."""
    x = mx.array(x) if isinstance(x, np.ndarray) else x
    mx.eval(x)
    return x


def norm(x: Any) -> float:
    return float(np.abs(np.asarray(x, np.float64)).max(initial=0))


def hold(ours: mx.array, torch32: torch.Tensor, torch64: torch.Tensor) -> None:
    assert ours.dtype == mx.float32
    hold_to_bar(ours, torch32.detach(), torch64.detach())


def check(ours: Callable[..., mx.array], reference: Callable[..., torch.Tensor], *arguments: Any) -> None:
    """Compare an operation with the same function in torch."""
    result = ours(*map(evaluated, arguments))
    hold(result, *(reference(*(tensor(x, t) for x in arguments)) for t in (torch.float32, torch.float64)))


def plain(function: Any) -> Any:
    return function


def check_gradients(
    ours: Callable[..., mx.array], reference: Callable[..., torch.Tensor], *inputs: np.ndarray, wrap: Any = plain
) -> None:
    """Compare the gradients of all inputs with torch's, for a random gradient of the output."""
    expected = []
    for dtype in (torch.float32, torch.float64):
        tensors = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in inputs]
        output = reference(*tensors)
        cotangent = numbers(*output.shape, seed=99)
        expected.append(torch.autograd.grad(output, tensors, torch.tensor(cotangent, dtype=dtype)))

    def loss(*x: mx.array) -> mx.array:
        return (ours(*x) * mx.array(cotangent)).sum()

    argnums = list(range(len(inputs)))
    gradient = mx.compile(mx.grad(loss, argnums)) if wrap is mx.compile else mx.grad(wrap(loss), argnums)
    found = gradient(*map(mx.array, inputs))
    for by_input, *bars in zip(found if len(inputs) > 1 else [found], *expected, strict=True):
        hold(by_input, *bars)


def torch_linear(
    x: Any, weight: Any, bias: Any = None, residual: Any = None, activation: str | None = None, scale: float = 1.0
) -> torch.Tensor:
    y = ACTIVATIONS[activation](F.linear(x, weight, bias)) * scale
    return y if residual is None else y + residual


def torch_layer_norm(x: Any, weight: Any, bias: Any = None, eps: float = EPS) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def torch_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def torch_softmax(x: torch.Tensor) -> torch.Tensor:
    return x.softmax(-1)


def torch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    offsets: list[int],
    mask: Any = None,
    cos: Any = None,
    sin: Any = None,
    bias_k: Any = None,
    bias_v: Any = None,
    bias: Any = None,
    query_norm: Any = None,
    key_norm: Any = None,
) -> torch.Tensor:
    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(0, 1)

    def rotate(x: torch.Tensor, part: slice) -> torch.Tensor:
        x1, x2 = x.chunk(2, -1)
        c, s = cos[part], sin[part]
        return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)

    if query_norm is not None:
        query, key = torch_layer_norm(query, query_norm), torch_layer_norm(key, key_norm)
    outputs = [query[:0]]
    for sequence, (start, end) in enumerate(itertools.pairwise(offsets)):
        part = slice(start, end)
        k, v = (x[part] if b is None else torch.cat([x[part], b[None]]) for x, b in ((key, bias_k), (value, bias_v)))
        q, k, v = split(query[part]), split(k), split(v)
        q = q * q.shape[-1] ** -0.5
        if cos is not None:
            q, k = rotate(q, part), rotate(k, part)
        scores = q @ k.mT
        if bias is not None:
            scores = scores + bias[0 if len(bias) == 1 else sequence]
        if mask is not None:
            hidden = torch.tensor(~mask[part])
            scores = scores.masked_fill(F.pad(hidden, (0, bias_k is not None)), -3e38)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(outputs)


def attention_inputs(
    heads: int, head_dim: int, offsets: list[int], options: str = "", scale: float = 1.0
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Return query, key and value, and the other arguments.

    Args:
        heads: number of heads.
        head_dim: features of a head.
        offsets: where each sequence begins.
        options: any of "mask", "rotary", "learned" (a key and a value), "bias", "one bias" (for all sequences) and
            "norms". With a bias all sequences have the same length.
        scale: of query and key.
    """
    tokens, features = offsets[-1], heads * head_dim
    more: dict[str, Any] = {}
    if "mask" in options:
        mask = np.random.default_rng(5).random(tokens) < 0.7
        for start, end in itertools.pairwise(offsets):
            mask[start : min(start + 1, end)] = True
        more["mask"] = mask
    if "rotary" in options:
        angles = numbers(tokens, head_dim // 2, scale=3, seed=6)
        more |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    if "learned" in options:
        more |= {"bias_k": numbers(features, seed=7), "bias_v": numbers(features, seed=8)}
    if "bias" in options:
        biases = 1 if "one bias" in options else len(offsets) - 1
        more["bias"] = numbers(biases, heads, offsets[1], offsets[1], scale=2, seed=9)
    if "norms" in options:
        more |= {"query_norm": numbers(features, seed=10), "key_norm": numbers(features, seed=11)}
    return [numbers(tokens, features, scale=s, seed=i) for i, s in enumerate((scale, scale, 1.0))], more


def run_python(code: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder`, whose modules take precedence."""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
