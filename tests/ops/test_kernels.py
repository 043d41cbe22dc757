"""The kernels of `native/`, each instruction set of this machine, against float64 and held to torch's float32."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_esm_hf import MLXEsmConfig, MLXEsmModel, ops
from mlx_esm_hf.ops import cpu, dispatch, kernels
from mlx_esm_hf.ops.layout import Layout
from tests.bar import hold_to_bar
from tests.tiny import tiny

native = kernels.native
if native is None:
    pytest.skip(f"the kernels are {kernels.STATE}", allow_module_level=True)

EPS = 1e-5
RAGGED = [0, 1, 1, 18, 300]  # with an empty sequence
OF_STEP = mx.array(1.0), mx.array(0.1), mx.array(1, mx.uint64)  # scale, learning rate and step of AdamW
ACTIVATIONS = {None: lambda x: x, "gelu": torch.nn.functional.gelu, "relu": torch.nn.functional.relu}
F = torch.nn.functional


pytestmark = pytest.mark.usefixtures("on_cpu")
every_set = pytest.mark.usefixtures("instructions")


def numbers(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def tensor(x: Any, dtype: torch.dtype) -> Any:
    return torch.tensor(x, dtype=dtype) if isinstance(x, np.ndarray) and x.dtype == np.float32 else x


def evaluated(x: Any) -> Any:
    """What `native` takes for an argument of a test, an array already evaluated."""
    x = mx.array(x) if isinstance(x, np.ndarray) else x
    mx.eval(x)
    return x


def norm(x: Any) -> float:
    return float(np.abs(np.asarray(x, np.float64)).max(initial=0))


def hold(ours: mx.array, torch32: torch.Tensor, torch64: torch.Tensor) -> None:
    assert ours.dtype == mx.float32
    hold_to_bar(ours, torch32.detach(), torch64.detach())


def check(ours: Callable[..., mx.array], reference: Callable[..., torch.Tensor], *arguments: Any) -> None:
    """Hold an operation to the same function in torch."""
    result = ours(*map(evaluated, arguments))
    hold(result, *(reference(*(tensor(x, t) for x in arguments)) for t in (torch.float32, torch.float64)))


def plain(function: Any) -> Any:
    return function


def check_gradients(
    ours: Callable[..., mx.array], reference: Callable[..., torch.Tensor], *inputs: np.ndarray, wrap: Any = plain
) -> None:
    """Hold the gradients by all inputs to torch's, for a random gradient of the output."""
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


wrappings = pytest.mark.parametrize("wrap", [plain, mx.compile, mx.checkpoint], ids=["plain", "compile", "checkpoint"])


# What the operations compute, in torch.


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
    """Query, key and value, and the other arguments.

    `options` of: mask; rotary; learned (a key and a value); bias, or one bias for all sequences, which with either have
    to be of one length; norms of query and key.
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


def check_attention(heads: int, head_dim: int, offsets: list[int], options: str = "", scale: float = 1.0) -> None:
    inputs, more = attention_inputs(heads, head_dim, offsets, options, scale)
    names = "mask", "cos", "sin", "bias_k", "bias_v", "bias", "query_norm", "key_norm"
    bound = [*inputs, heads, offsets, *map(more.get, names)]
    check(native.attention, torch_attention, *bound)


OPTIONS = ["", "mask", "rotary", "mask rotary", "learned", "mask learned", "rotary norms", "mask norms"]
BIASED = ["bias", "one bias", "mask bias", "rotary one bias", "mask rotary bias"]


# Results


@every_set
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 300, 1022])
def test_linear(tokens):
    for outputs, inputs in itertools.product([1, 5, 33, 320, 641], [1, 7, 320, 1283]):
        x, weight = numbers(tokens, inputs), numbers(outputs, inputs, scale=inputs**-0.5, seed=1)
        check(native.linear, torch_linear, x, weight)
        check(
            native.linear, torch_linear, x, weight, numbers(outputs, seed=2), numbers(tokens, outputs, seed=3), "gelu"
        )


@every_set
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [None, numbers(2, 9, 33, seed=3)], ids=["", "residual"])
@pytest.mark.parametrize("bias", [None, numbers(33, seed=2)], ids=["", "bias"])
@pytest.mark.parametrize("scale", [1.0, 0.7], ids=["", "scale"])
def test_linear_options(scale, bias, residual, activation):
    check(native.linear, torch_linear, numbers(2, 9, 70), numbers(33, 70, seed=1), bias, residual, activation, scale)


@every_set
def test_relu_of_nan_and_infinity():
    x = mx.array([[np.nan], [np.inf], [-np.inf]])
    found = np.array(native.linear(x, mx.array([[1.0]]), activation="relu"))
    np.testing.assert_array_equal(found, [[np.nan], [np.inf], [0]])


@every_set
def test_operands_that_are_not_contiguous():
    x, weight, residual = numbers(70, 2, 9), numbers(70, 33, seed=1), numbers(33, 9, 2, seed=3)
    views = [mx.array(x).transpose(2, 1, 0)[:, ::-1], mx.array(weight).T, mx.broadcast_to(mx.array(0.5), (33,))]
    ours = native.linear(*views, mx.array(residual).transpose(1, 2, 0))
    same = native.linear(*(mx.array(np.array(v)) for v in views), mx.array(residual.transpose(1, 2, 0).copy()))
    assert mx.array_equal(ours, same)
    for operation in (native.gelu, native.softmax, lambda x: native.swiglu(x, x)):
        assert mx.array_equal(operation(views[0]), operation(mx.array(np.array(views[0]))))
    (q, k, v), _ = attention_inputs(2, 8, [0, 20])
    fused = mx.split(mx.concatenate([mx.array(i) for i in (q, k, v)], axis=-1), 3, axis=-1)
    assert mx.array_equal(native.attention(*fused, 2, [0, 20]), native.attention(*map(mx.array, (q, k, v)), 2, [0, 20]))


@every_set
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw(decay):
    """Ten steps beside torch, with a learning rate that changes, and a gradient that is scaled."""
    start, gradients = numbers(37, 501), numbers(10, 37, 501, seed=1)

    def theirs(dtype: torch.dtype) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
        optimizer = torch.optim.AdamW([weight], weight_decay=decay, betas=(0.9, 0.98), eps=1e-8)
        for i, gradient in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = 1e-2 / (i + 1)
            weight.grad = torch.tensor(gradient, dtype=dtype) * 0.5
            optimizer.step()
        return weight

    weight, mean, square = mx.array(start), mx.zeros(start.shape), mx.zeros(start.shape)
    for i, gradient in enumerate(gradients):
        of_step = mx.array(0.5), mx.array(1e-2 / (i + 1)), mx.array(i + 1, mx.uint64)
        weight, mean, square = ops.adamw(weight, mx.array(gradient), mean, square, *of_step, (0.9, 0.98), 1e-8, decay)
    hold(weight, theirs(torch.float32), theirs(torch.float64))


@every_set
def test_adamw_leaves_what_others_hold():
    """It works in place only where nobody else has the array."""
    weight, held, ones = mx.array([1.0, 2.0]), mx.array([0.5, 0.5]), mx.ones(2)
    mx.eval(native.adamw(weight, ones, held, ones, *OF_STEP, 0.9, 0.98, 1e-8, 0.0))
    assert (weight.tolist(), held.tolist(), ones.tolist()) == ([1.0, 2.0], [0.5, 0.5], [1.0, 1.0])


@every_set
def test_layer_norm_takes_over_what_nobody_holds():
    """The memory of its input, unless that is part of something larger."""
    x, weight = numbers(2000, 640), mx.ones(640)
    held = mx.array(x)
    expected = np.array(ops.layer_norm(held, weight, None, EPS))
    assert np.array_equal(np.array(held), x)
    before = mx.get_active_memory()
    y = ops.layer_norm(mx.array(x) + 0, weight, None, EPS)
    mx.eval(y)
    assert np.array_equal(np.array(y), expected)
    mx.reset_peak_memory()
    mx.eval(y := ops.layer_norm(y * 1, weight, None, EPS))
    assert mx.get_peak_memory() - before < 2.5 * y.nbytes
    rows = ops.layer_norm((mx.array(x) + 0)[:2], weight, None, EPS)
    mx.eval(rows)
    assert np.array_equal(np.array(rows), expected[:2])
    del y
    assert mx.get_active_memory() - before < x.nbytes / 2


@every_set
@pytest.mark.parametrize("size", [0, 1, 17, 100_003])
def test_sum_of_squares(size):
    x = numbers(size)
    theirs = [(torch.tensor(x, dtype=dtype) ** 2).sum() for dtype in (torch.float32, torch.float64)]
    hold(ops.sum_of_squares(mx.array(x)), *theirs)


@every_set
@pytest.mark.parametrize("shape", [(5, 1), (5, 3), (2, 7, 15), (5, 33), (100, 1280)])
@pytest.mark.parametrize("scale", [0.1, 3, 1e4])
def test_elementwise(shape, scale):
    x, weight, bias = numbers(*shape, scale=scale), numbers(shape[-1], seed=1), numbers(shape[-1], seed=2)
    check(native.gelu, F.gelu, x)
    check(native.swiglu, torch_swiglu, x, numbers(*shape, seed=3))
    check(native.softmax, torch_softmax, x)
    check(native.layer_norm, torch_layer_norm, x, weight, bias, EPS)
    check(native.layer_norm, torch_layer_norm, x, weight, None, EPS)
    check(native.layer_norm, torch_layer_norm, x + np.float32(10 * scale), weight, bias, EPS)


@every_set
def test_gelu_far_out():
    x = np.array([0, 1e-30, -1e-30, 13, -13, 1e4, -1e4, 3e38, -3e38, np.inf, np.nan, 1] * 3, np.float32)[:-1]
    gelu, slope = native.gelu(mx.array(x)), mx.grad(lambda x: native.gelu(x).sum())(mx.array(x))
    wide = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    exact = F.gelu(wide)
    exact.sum().backward()
    np.testing.assert_allclose(np.array(gelu), exact.detach().numpy(), rtol=1e-6, atol=1e-30)
    finite = np.isfinite(x)  # where torch has a slope
    np.testing.assert_allclose(np.array(slope)[finite], wide.grad.numpy()[finite], rtol=1e-6, atol=1e-6)
    assert np.isnan(np.array(slope)[np.isnan(x)]).all()


@every_set
def test_swiglu_far_out():
    x = np.array([0, 1e-30, -1e-30, 88, -88, 100, -100, 3e38, -3e38, np.inf, -np.inf, np.nan, 1] * 3, np.float32)[:-1]
    ones = mx.ones(len(x))
    y, slope = native.swiglu(mx.array(x), ones), mx.grad(lambda x: native.swiglu(x, ones).sum())(mx.array(x))
    wide = torch.tensor(x.clip(-1e3), dtype=torch.float64, requires_grad=True)  # below, torch has -inf · 0
    exact = F.silu(wide)
    exact.sum().backward()
    np.testing.assert_allclose(np.array(y), exact.detach().numpy(), rtol=1e-6, atol=1e-30)
    finite = np.isfinite(x)
    np.testing.assert_allclose(np.array(slope)[finite], wide.grad.numpy()[finite], rtol=1e-6, atol=1e-6)
    assert np.isnan(np.array(slope)[np.isnan(x)]).all()


@every_set
def test_rows_with_nan_or_infinity():
    x = numbers(6, 37)
    x[1, 36], x[2, 0], x[3, 5], x[4, 5] = np.nan, np.nan, -np.inf, np.inf
    for ours, theirs in (
        (native.softmax(mx.array(x)), torch.tensor(x).softmax(-1)),
        (native.layer_norm(mx.array(x), mx.ones(37), mx.zeros(37), EPS), F.layer_norm(torch.tensor(x), (37,))),
    ):
        np.testing.assert_allclose(np.array(ours), theirs.numpy(), rtol=1e-4, atol=1e-6)


@every_set
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("head_dim", [7, 16, 20, 24, 32, 64])
def test_attention_of_ragged_sequences(head_dim, options):
    if "rotary" not in options or head_dim % 2 == 0:
        check_attention(3, head_dim, RAGGED, options)


@every_set
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 255, 1022])
def test_attention_lengths(length):
    for options in OPTIONS:
        check_attention(1 if length == 1022 else 5, 16, [0, length], options)


@every_set
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 15, 17, 63, 300])
def test_attention_with_a_bias(length, batch):
    offsets = list(range(0, batch * length + 1, length))
    for options in BIASED:
        check_attention(3, 16, offsets, options)
    check_attention(2, 7, offsets, "mask bias", scale=10)


@every_set
def test_a_bias_that_hides_what_it_should():
    """-inf in the bias hides a key from a query, as the mask does from all."""
    (q, k, v), more = attention_inputs(2, 8, [0, 20, 40], "mask")
    hidden = np.where(more["mask"].reshape(2, 1, 1, 20), 0, -np.inf).astype(np.float32)
    bias = mx.array(np.broadcast_to(hidden, (2, 2, 20, 20)))
    by_bias = native.attention(*map(mx.array, (q, k, v)), 2, [0, 20, 40], bias=bias)
    by_mask = native.attention(*map(mx.array, (q, k, v)), 2, [0, 20, 40], mx.array(more["mask"]))
    np.testing.assert_allclose(np.array(by_bias), np.array(by_mask), rtol=0, atol=1e-6)


@every_set
@pytest.mark.parametrize("options", ["mask rotary", "learned", "bias"])
def test_attention_of_4000_tokens(options):
    check_attention(1, 20, [0, 4000], options)


@every_set
@pytest.mark.parametrize("scale", [3, 100])
def test_attention_of_large_scores(scale):
    check_attention(2, 16, RAGGED, "mask", scale)  # up to 4 · 100²


@every_set
def test_attention_at_the_ends_of_float32():
    key = mx.array([[-3.3e38], [-3e38], [-1e4], [1e4]])
    for query in (1.0, -1.0, 0.0):
        for shown in (slice(0, 1), slice(0, 2), slice(0, 4), slice(2, 4)):
            k = key[shown]
            n = k.shape[0]
            out = native.attention(mx.full((n, 1), query), k, mx.arange(n, dtype=mx.float32)[:, None], 1, [0, n])
            assert mx.isfinite(out).all() and out.min() >= 0 and out.max() <= n - 1 + 1e-6
    # Nothing to see in the second sequence: its keys count alike, as in `ops.attention` on MLX's own operations.
    value = mx.array(numbers(9, 6))
    out = native.attention(value, value, value, 2, [0, 4, 9], mx.array([True] * 4 + [False] * 5))
    np.testing.assert_allclose(np.array(out)[4:], np.tile(np.array(value)[4:].mean(0), (5, 1)), atol=1e-6)


@every_set
@pytest.mark.parametrize("options", OPTIONS)
def test_neighbours_in_a_batch_change_nothing(options):
    offsets = [0, 1, 1, 18, 258, 600]
    inputs, more = attention_inputs(2, 20, offsets, options)

    def attend(part: slice, offsets: list[int], inputs: list[np.ndarray] = inputs) -> np.ndarray:
        rest = {n: mx.array(x[part] if n in ("mask", "cos", "sin") else x) for n, x in more.items()}
        return np.array(native.attention(*(mx.array(x[part]) for x in inputs), 2, offsets, **rest))

    together = attend(slice(None), offsets)
    for start, end in itertools.pairwise(offsets):
        assert np.array_equal(attend(slice(start, end), [0, end - start]), together[start:end])
    for spoilt, bad in itertools.product(range(3), (np.nan, np.inf)):
        x = [i.copy() for i in inputs]
        x[spoilt][18] = bad  # which is never hidden
        found = attend(slice(None), offsets, x)
        assert np.array_equal(found[:18], together[:18]) and np.array_equal(found[258:], together[258:])
        assert not np.isfinite(found[18:258]).all()


@every_set
def test_rows_of_linear_do_not_depend_on_the_others():
    x, weight, bias = (mx.array(numbers(*s, seed=i)) for i, s in enumerate([(600, 77), (41, 77), (41,)]))
    together = native.linear(x, weight, bias, None, "gelu")
    for part in (slice(0, 1), slice(5, 22), slice(255, 600)):
        assert mx.array_equal(native.linear(x[part], weight, bias, None, "gelu"), together[part])


@every_set
@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_no_tokens(offsets):
    x, row = mx.zeros((0, 8)), mx.ones((8,))
    for output in (
        native.linear(x, mx.ones((8, 8)), row, x, "gelu"),
        native.gelu(x),
        native.swiglu(x, x),
        native.softmax(x),
        native.layer_norm(x, row, row, EPS),
        native.layer_norm(x, row, None, EPS),
        native.attention(x, x, x, 2, offsets),
        native.attention(x, x, x, 2, offsets, bias=mx.zeros((1, 2, 0, 0))),
        native.attention(x, x, x, 2, offsets, mx.zeros((0,), mx.bool_), mx.zeros((0, 2)), mx.zeros((0, 2))),
        native.attention(x, x, x, 2, offsets, None, None, None, row, row),
        native.attention(x, x, x, 2, offsets, query_norm=row, key_norm=row),
    ):
        mx.eval(output)
        assert output.shape == (0, 8)


def test_no_features():
    """Either a result or an exception, but not the end of the process."""
    process = python("""
import mlx.core as mx
from mlx_esm_hf.ops.kernels import native
nothing = mx.zeros((0,))
for call in (
    lambda: native.linear(mx.ones((5, 0)), mx.ones((3, 0))),
    lambda: native.linear(mx.ones((5, 3)), mx.ones((0, 3))),
    lambda: native.layer_norm(mx.ones((5, 0)), nothing, nothing, 1e-5),
):
    try:
        mx.eval(call())
    except ValueError:
        pass
""")
    assert process.returncode == 0, process.stderr


# Gradients


@every_set
@wrappings
@pytest.mark.parametrize("scale", [1.0, 0.7], ids=["", "scale"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_linear(activation, scale, wrap):
    shapes = [(2, 19, 45), (33, 45), (33,), (2, 19, 33)]
    inputs = [numbers(*s, seed=i) for i, s in enumerate(shapes)]
    for n in (2, 3, 4):
        rest = [*[None] * (4 - n), activation, scale]
        ours, theirs = (lambda *x, f=f, rest=rest: f(*x, *rest) for f in (native.linear, torch_linear))
        check_gradients(ours, theirs, *inputs[:n], wrap=wrap)


@every_set
@wrappings
@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 15), (150, 33), (65, 320)])
def test_gradients_of_elementwise(shape, wrap):
    x, weight, bias = numbers(*shape, scale=2), numbers(shape[-1], seed=1), numbers(shape[-1], seed=2)
    check_gradients(native.gelu, F.gelu, x, wrap=wrap)
    check_gradients(native.swiglu, torch_swiglu, x, numbers(*shape, seed=3), wrap=wrap)
    check_gradients(native.softmax, torch_softmax, x, wrap=wrap)
    check_gradients(lambda *x: native.layer_norm(*x, EPS), torch_layer_norm, x + np.float32(3), weight, bias, wrap=wrap)
    check_gradients(lambda *x: native.layer_norm(*x, None, EPS), torch_layer_norm, x, weight, wrap=wrap)


def check_attention_gradients(heads: int, head_dim: int, offsets: list[int], options: str, wrap: Any = plain) -> None:
    inputs, more = attention_inputs(heads, head_dim, offsets, options)
    trained = [n for n in ("bias_k", "bias_v", "bias", "query_norm", "key_norm") if n in more]
    biases = [more.pop(n) for n in trained]

    def bound(function: Any, convert: Any) -> Any:
        def call(q: Any, k: Any, v: Any, *bias: Any) -> Any:
            rest = {n: convert(x, q) for n, x in more.items()}
            return function(q, k, v, heads, offsets, **rest, **dict(zip(trained, bias, strict=True)))

        return call

    check_gradients(
        bound(native.attention, lambda x, q: mx.array(x)),
        bound(torch_attention, lambda x, q: tensor(x, q.dtype)),
        *inputs,
        *biases,
        wrap=wrap,
    )


@every_set
@wrappings
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_of_attention(options, wrap):
    check_attention_gradients(2, 20, [0, 1, 18, 150], options, wrap)


@every_set
@pytest.mark.parametrize(("head_dim", "length"), [(7, 33), (16, 1), (64, 17), (24, 700), (40, 255)])
def test_gradients_of_attention_sizes(head_dim, length):
    for options in ("mask learned", "mask bias" if head_dim % 2 else "mask rotary bias"):
        check_attention_gradients(2, head_dim, [0, length], options)


@every_set
@wrappings
@pytest.mark.parametrize("options", BIASED)
def test_gradients_of_attention_with_a_bias(options, wrap):
    check_attention_gradients(3, 20, [0, 37, 74, 111], options, wrap)


@every_set
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_with_an_empty_sequence(options):
    mx.eval([mx.full((4, 16), np.nan) for _ in range(50)])  # memory that is handed out again
    check_attention_gradients(2, 8, [0, 3, 3, 3, 20], options)


@every_set
def test_gradients_without_tokens():
    x, row = mx.zeros((0, 8)), mx.ones((8,))
    mx.eval([mx.full((2, 8), np.nan) for _ in range(50)])
    for f in (
        lambda b: native.attention(x, x, x, 2, [0, 0, 0], None, None, None, b, b),
        lambda b: native.attention(x, x, x, 2, [0, 0, 0], query_norm=b, key_norm=b),
        lambda b: native.linear(x, mx.ones((8, 8)), b, None, "gelu"),
        lambda b: native.layer_norm(x, b, b, EPS),
    ):
        assert mx.array_equal(mx.grad(lambda b, f=f: f(b).sum())(row), mx.zeros(8))


def test_checkpoint_takes_mask_and_angles_as_arguments():
    """mx.checkpoint asks for the gradients by all of a function's arguments, also by those that have none."""
    code = """
import mlx.core as mx
from mlx_esm_hf.ops.kernels import native
x, b, mask = mx.random.normal((5, 8)), mx.random.normal((8,)), mx.array([True] * 4 + [False])
angles, bias = mx.random.normal((5, 2)), mx.random.normal((1, 2, 5, 5))
cos, sin = mx.cos(angles), mx.sin(angles)
for f, more in [
    (lambda x, m: native.attention(x, x, x, 2, [0, 5], m), (mask,)),
    (lambda x, m, b: native.attention(x, x, x, 2, [0, 5], m, None, None, b, b), (mask, b)),
    (lambda x, m, c, s: native.attention(x, x, x, 2, [0, 5], m, c, s), (mask, cos, sin)),
    (lambda x, m, b: native.attention(x, x, x, 2, [0, 5], m, bias=b), (mask, bias)),
    (lambda x, c, s, b: native.attention(x, x, x, 2, [0, 5], None, c, s, query_norm=b, key_norm=b), (cos, sin, b)),
    (lambda x, m, b: native.attention(x, x, x, 2, [0, 5], m, query_norm=b, key_norm=b), (mask, b)),
]:
    plain, again = (mx.grad(lambda x: (g(x, *more) ** 2).sum())(x) for g in (f, mx.checkpoint(f)))
    assert mx.allclose(plain, again, rtol=1e-4, atol=1e-5), (plain, again)
"""
    process = python(code)
    assert process.returncode == 0, process.stderr


# Other transformations


def operations() -> list[tuple[Callable[..., mx.array], list[mx.array]]]:
    """Functions of arrays, and arrays."""
    (q, k, v), more = attention_inputs(2, 8, [0, 1, 1, 18], "mask rotary")
    rest = {n: mx.array(x) for n, x in more.items()}
    b = mx.array(numbers(16, seed=9))
    x, qkv = mx.array(numbers(18, 16)), [mx.array(i) for i in (q, k, v)]
    w, bias = mx.array(numbers(16, 16, scale=0.25, seed=4)), mx.array(numbers(1, 2, 9, 9, seed=10))
    return [
        (lambda x, w, b: native.linear(x, w, b, x, "gelu"), [x, w, b]),
        (lambda x, w, b: native.linear(x, w, b, x, "relu", 0.7), [x, w, b]),
        (native.gelu, [x]),
        (native.swiglu, [x, mx.array(numbers(18, 16, seed=11))]),
        (native.softmax, [x]),
        (lambda x, w, b: native.layer_norm(x, w, b, EPS), [x, b, b + 1]),
        (lambda x, w: native.layer_norm(x, w, None, EPS), [x, b]),
        (lambda q, k, v: native.attention(q, k, v, 2, [0, 1, 1, 18], **rest), qkv),
        (lambda q, k, v, b: native.attention(q, k, v, 2, [0, 18], None, None, None, b, b), [*qkv, b]),
        (lambda q, k, v, bias: native.attention(q, k, v, 2, [0, 9, 18], bias=bias, **rest), [*qkv, bias]),
        (lambda q, k, v, b: native.attention(q, k, v, 2, [0, 1, 1, 18], query_norm=b, key_norm=b, **rest), [*qkv, b]),
    ]


OPERATIONS = ["linear gelu", "linear relu", "gelu", "swiglu", "softmax", "layer_norm", "layer_norm without bias",
              "attention rotary", "attention learned", "attention bias", "attention norms"]  # fmt: skip
every_operation = pytest.mark.parametrize("i", range(11), ids=OPERATIONS)


@every_set
@every_operation
def test_jvp_and_vmap(i):
    f, arguments = operations()[i]
    tangents = [mx.array(numbers(*a.shape, seed=50 + n)) for n, a in enumerate(arguments)]
    cotangent = mx.array(numbers(*arguments[0].shape, seed=60))
    (output,), (forward,) = mx.jvp(lambda *x: f(*x), arguments, tangents)
    assert norm(output - f(*arguments)) <= 1e-5
    _, backward = mx.vjp(lambda *x: f(*x), arguments, [cotangent])
    by_forward = (forward * cotangent).sum().item()
    by_backward = sum((t * g).sum().item() for t, g in zip(tangents, backward, strict=True))
    assert by_forward == pytest.approx(by_backward, rel=1e-4, abs=1e-3)

    for batched in range(len(arguments)):  # a batch of this argument, then of all
        batch = [mx.stack([a, a * 0.5, -a]) if n == batched else a for n, a in enumerate(arguments)]
        axes = tuple(0 if n == batched else None for n in range(len(arguments)))
        expected = mx.stack([f(*(a[j] if x == 0 else a for a, x in zip(batch, axes, strict=True))) for j in range(3)])
        assert norm(mx.vmap(f, in_axes=axes)(*batch) - expected) <= 1e-5
    batch = [mx.stack([a, a * 0.5, -a], axis=1) for a in arguments]
    expected = mx.stack([f(*(a[:, j] for a in batch)) for j in range(3)])
    assert norm(mx.vmap(f, in_axes=(1,) * len(batch))(*batch) - expected) <= 1e-5


@every_set
@every_operation
def test_second_derivatives(i):
    f, arguments = operations()[i]

    def slope(x: mx.array) -> mx.array:
        return (mx.grad(lambda x: (f(x, *arguments[1:]) ** 2).sum())(x) ** 2).sum()

    if "attention" in OPERATIONS[i]:
        with pytest.raises(RuntimeError, match="no second derivatives.*MLX_ESM_KERNELS=0"):
            mx.eval(mx.grad(slope)(arguments[0]))
        return
    rest = [torch.tensor(np.array(a, np.float64)) for a in arguments[1:]]
    theirs = [
        lambda x, w, b: torch_linear(x, w, b, x, "gelu"),
        lambda x, w, b: torch_linear(x, w, b, x, "relu", 0.7),
        F.gelu,
        torch_swiglu,
        torch_softmax,
        torch_layer_norm,
        torch_layer_norm,
    ][i]
    x = torch.tensor(np.array(arguments[0], np.float64), requires_grad=True)
    first = torch.autograd.grad((theirs(x, *rest) ** 2).sum(), x, create_graph=True)[0]
    expected = torch.autograd.grad((first**2).sum(), x)[0].numpy()
    assert norm(np.array(mx.grad(slope)(arguments[0])) - expected) <= 1e-4 * norm(expected)


@every_set
@every_operation
def test_the_same_bits_anywhere(i):
    f, arguments = operations()[i]
    mx.eval(arguments)
    expected = np.array(f(*arguments))
    for _ in range(3):
        assert np.array_equal(np.array(f(*arguments)), expected)
    lazy = f(*(a + 0 for a in arguments))
    assert np.array_equal(np.array(lazy), expected)
    with mx.stream(mx.new_stream(mx.cpu)):
        assert np.array_equal(np.array(f(*arguments)), expected)
    assert np.array_equal(np.array(mx.compile(f)(*arguments)), expected)


@every_set
def test_threads_at_once():
    x, w = mx.array(numbers(300, 64)), mx.array(numbers(64, 64, scale=0.125, seed=1))
    mx.eval(x, w)

    def work(_: int) -> list[np.ndarray]:
        results = []
        with mx.stream(mx.new_stream(mx.cpu)):
            for _ in range(20):
                y = native.linear(native.gelu(x), w, None, x)
                results.append(np.array(native.attention(y, x, x, 4, RAGGED)))
        return results

    expected = work(0)[0]
    with ThreadPoolExecutor(2) as threads:
        for result in itertools.chain(*threads.map(work, range(2))):
            assert np.array_equal(result, expected)


# Errors


@pytest.mark.parametrize(
    ("operands", "error"),
    [("x, w", "std::bad_alloc"), ("column, column", "there is no memory for a result of 17592186044416 bytes")],
    ids=["in the work", "for its result"],
)
def test_want_of_memory_is_an_error_and_leaves_the_queue_free(operands, error):
    """It comes more often than there are places in the queue."""
    process = python(f"""
import resource
from pathlib import Path
import mlx.core as mx
from mlx_esm_hf.ops.kernels import native

mx.set_default_device(mx.cpu)
x, w = mx.zeros((16, 1 << 21)), mx.zeros((1, 1 << 21))  # of which 128 MB are packed
column, small = mx.zeros((1 << 21, 1)), mx.ones((4, 4))
mx.eval(x, w, column, native.linear(small, small))
size = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (int(size.split()[1]) * 1024 + (64 << 20), resource.RLIM_INFINITY))
for _ in range(10):
    try:
        mx.eval(native.linear({operands}))
    except RuntimeError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert mx.array_equal(native.linear(small, small), small @ small)
assert mx.array_equal(native.linear(x, w), mx.zeros((16, 1)))
""")
    assert process.returncode == 0, process.stderr
    errors = process.stdout.splitlines()
    assert len(errors) == 10 and all(error in line for line in errors), errors


# Arguments


x34, x4, w54, q = mx.zeros((3, 4)), mx.zeros((4,)), mx.zeros((5, 4)), mx.zeros((6, 8))


@pytest.mark.parametrize(
    "call",
    [
        lambda: native.linear(x34, mx.zeros((5, 3))),
        lambda: native.linear(x34, x4),
        lambda: native.linear(mx.array(1.0), w54),
        lambda: native.linear(x34, w54, mx.zeros((4,))),
        lambda: native.linear(x34, w54, None, mx.zeros((3, 4))),
        lambda: native.linear(x34.astype(mx.float16), w54),
        lambda: native.linear(x34, w54.astype(mx.bfloat16)),
        lambda: native.linear(x34, w54, activation="tanh"),
        lambda: native.gelu(x34.astype(mx.float16)),
        lambda: native.swiglu(x34, x4),
        lambda: native.swiglu(x34, x34.astype(mx.float16)),
        lambda: native.softmax(x34.astype(mx.float16)),
        lambda: native.softmax(mx.zeros((3, 0))),
        lambda: native.softmax(mx.array(1.0)),
        lambda: native.layer_norm(x34, x4, mx.zeros((3,)), EPS),
        lambda: native.layer_norm(x34, mx.zeros((1, 4)), mx.zeros((1, 4)), EPS),
        lambda: native.layer_norm(x34, x4.astype(mx.float16), x4, EPS),
        lambda: native.attention(q, q, q, 3, [0, 6]),
        lambda: native.attention(q, q, q, 0, [0, 6]),
        lambda: native.attention(q, q[:5], q, 2, [0, 6]),
        lambda: native.attention(q[0], q[0], q[0], 2, [0, 1]),
        lambda: native.attention(q, q, q.astype(mx.float16), 2, [0, 6]),
        *(
            lambda offsets=offsets: native.attention(q, q, q, 2, offsets)
            for offsets in ([], [0], [0, 5], [0, 7], [1, 6], [6], [0, 4, 3, 6], [0, -1, 6], [0, 9, 6])
        ),
        lambda: native.attention(q, q, q, 2, [0, 6], mx.zeros((5,), mx.bool_)),
        lambda: native.attention(q, q, q, 2, [0, 6], mx.zeros((6,))),
        lambda: native.attention(q, q, q, 2, [0, 6], None, mx.zeros((6, 2))),
        lambda: native.attention(q, q, q, 2, [0, 6], None, mx.zeros((6, 4)), mx.zeros((6, 4))),
        lambda: native.attention(q, q, q, 8, [0, 6], None, mx.zeros((6, 0)), mx.zeros((6, 0))),
        lambda: native.attention(q, q, q, 2, [0, 6], None, None, None, mx.zeros((8,))),
        lambda: native.attention(q, q, q, 2, [0, 6], None, None, None, mx.zeros((4,)), mx.zeros((4,))),
        *(
            lambda shape=shape, offsets=offsets, more=more: native.attention(
                q, q, q, 2, offsets, bias=mx.zeros(shape), **more
            )
            for shape, offsets, more in [
                ((1, 2, 6, 5), [0, 6], {}),
                ((2, 2, 6, 6), [0, 6], {}),
                ((0, 2, 6, 6), [0, 6], {}),
                ((1, 1, 6, 6), [0, 6], {}),
                ((2, 6, 6), [0, 6], {}),
                ((3, 2, 3, 3), [0, 3, 6], {}),
                ((1, 2, 4, 4), [0, 4, 6], {}),
                ((1, 2, 6, 6), [0, 6], {"bias_k": mx.zeros((8,)), "bias_v": mx.zeros((8,))}),
            ]
        ),
        lambda: native.attention(q, q, q, 2, [0, 6], bias=mx.zeros((1, 2, 6, 6), mx.float16)),
        lambda: native.attention(q, q, q, 2, [0, 6], query_norm=mx.zeros((8,))),
        lambda: native.attention(q, q, q, 2, [0, 6], query_norm=mx.zeros((4,)), key_norm=mx.zeros((4,))),
        lambda: native.choose("nonsense"),
        lambda: native.adamw(q, q, q, mx.zeros((3,)), *OF_STEP, 0.9, 0.98, 1e-8, 0.0),
        lambda: native.adamw(q, q, q, q, *OF_STEP[:2], mx.array(1), 0.9, 0.98, 1e-8, 0.0),
    ],
)
def test_wrong_arguments(call):
    with pytest.raises(ValueError):
        call()


# As the backend of `ops`


def test_a_batch_through_ops(monkeypatch):
    """What `ops` hands on, mask, angles and bias of a padded batch, arrives: the same as on MLX's operations."""
    B, L, H, d = 3, 17, 4, 8
    query, key, value = (mx.array(numbers(B, L, H * d, seed=i)) for i in range(3))
    angles, bias = mx.array(numbers(B, L, d // 2, seed=3)), mx.array(numbers(B, H, L, L, seed=4))
    layout = ops.Layout((B, L), mx.array(np.random.default_rng(5).random((B, L)) < 0.7))
    learned = (mx.array(numbers(1, 1, H * d, seed=6)), mx.array(numbers(1, 1, H * d, seed=7)))
    weight, row = mx.array(numbers(9, H * d, seed=8)), mx.array(numbers(H * d, seed=9))
    residual = mx.array(numbers(B, L, 9, seed=10))
    calls = [
        lambda: ops.attention(query, key, value, H, layout, (mx.cos(angles), mx.sin(angles)), None, bias),
        lambda: ops.attention(query, key, value, H, layout, None, learned),
        lambda: ops.attention(query, key, value, H, layout, (mx.cos(angles), mx.sin(angles)), norms=(row, row, EPS)),
        lambda: ops.linear(query, weight, None, residual, "relu"),
        lambda: ops.linear(query, weight, row[:9], residual, "gelu", 0.7),
        lambda: ops.layer_norm(query, row, None, EPS),
        lambda: ops.layer_norm(query, row, row, EPS),
        lambda: ops.swiglu(query, key),
    ]
    for call in calls:
        monkeypatch.setattr(dispatch, "backend_of", lambda *arrays: native)
        ours = call()
        monkeypatch.setattr(dispatch, "backend_of", lambda *arrays: cpu)
        assert norm(ours - call()) <= 1e-5


# Packed batches


@pytest.mark.parametrize(
    ("rows", "offsets"),
    [
        (["1110", "1111"], [0, 3, 7]),
        (["0011", "0111"], [0, 2, 5]),
        (["1010", "0000", "0110"], [0, 2, 2, 4]),
        (["0000", "0000"], [0, 0, 0]),
        (["1"], [0, 1]),
    ],
)
def test_packed_layout(rows, offsets):
    mask = np.array([[c == "1" for c in row] for row in rows])
    layout, x = Layout(mask.shape, packed=mask), numbers(*mask.shape, 3)
    assert layout.offsets == offsets
    packed = layout.pack(mx.array(x))
    assert np.array_equal(np.array(packed), x[mask][None])
    assert np.array_equal(np.array(layout.unpack(packed)), x * mask[..., None])
    assert layout.pack(mx.array(x[..., 0])).shape == (1, offsets[-1])


@functools.cache
def model_of(family: str) -> MLXEsmModel:
    mx.random.seed(0)
    config = MLXEsmConfig(**tiny(family, hidden_size=24, num_attention_heads=2, intermediate_size=40))
    model = MLXEsmModel(config)
    model.eval()
    return model


@pytest.mark.parametrize("family", ["ESM-1v", "ESM-2"])
@given(mask=st.integers(1, 19).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1)))
@settings(max_examples=30)
def test_model_on_any_mask_is_each_sequence_alone(family, mask):
    mask = np.array(mask[:6])
    model, ids = model_of(family), np.random.default_rng(0).integers(4, 24, mask.shape)
    ids[~mask] = 1
    positions = np.where(mask, np.cumsum(mask, axis=1) + 1, 1)
    found = np.array(model(ids, mask.astype(int), position_ids=positions).last_hidden_state)
    for row, real in enumerate(mask):
        if real.any():
            alone = model(ids[row : row + 1, real], position_ids=positions[row : row + 1, real]).last_hidden_state
            np.testing.assert_allclose(found[row, real], np.array(alone)[0], rtol=0, atol=2e-6)


# Switching


def python(code: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run in `folder`, whose modules come before all others."""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_switching_by_environment(monkeypatch):
    show = "from mlx_esm_hf.ops import kernels as k; print(k.native and k.native.instruction_set(), k.STATE, sep='|')"
    with ThreadPoolExecutor(2) as threads:
        off, portable = threads.map(lambda wish: python(show, MLX_ESM_KERNELS=wish), ["0", "portable"])
    assert off.stdout.strip() == "None|off (MLX_ESM_KERNELS=0)"
    assert portable.stdout.strip() == f"portable|portable, threads: {native.threads()}"
    monkeypatch.setenv("MLX_ESM_KERNELS", "nonsense")
    with pytest.raises(ValueError, match="MLX_ESM_KERNELS=nonsense.*" + ", ".join(native.instruction_sets())):
        kernels._load()


@every_set
def test_multiply_adds():
    """The loop that benchmarks take for the machine's peak: its sums converge to 1/2."""
    assert native.multiply_adds(1e7) == 0.5


@pytest.mark.parametrize(
    ("build", "state"),
    [
        (None, "not built; install mlx-esm-hf again, by pip's"),
        ("{unreadable", "not built; install mlx-esm-hf again, by pip's"),
        (json.dumps({"error": "no compiler"}), "not built (no compiler)"),
        (json.dumps({"mlx": "0.1"}), "built with mlx-cpu 0.1, installed is "),
    ],
)
def test_kernels_that_do_not_fit_are_left_out(build, state, tmp_path, monkeypatch):
    monkeypatch.delenv("MLX_ESM_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "BUILD", tmp_path / "_native.json")
    if build is not None:
        kernels.BUILD.write_text(build)
    module, said = kernels._load()
    assert module is None and said.startswith("off: ") and state in said


SHOW_STATE = """
import numpy as np
import mlx_esm_hf
print("imported", flush=True)
from mlx_esm_hf import MLXEsmConfig, MLXEsmModel
from mlx_esm_hf.ops import kernels
config = MLXEsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, hidden_size=8, num_hidden_layers=1,
                      num_attention_heads=2, intermediate_size=8, position_embedding_type="rotary")
for _ in range(2):
    assert np.isfinite(np.array(MLXEsmModel(config)([[0, 5, 2]]).last_hidden_state)).all()
print(kernels.STATE)
"""


def without_kernels(folder: Path, **files: str) -> Path:
    """A copy of the package without kernels, and with files of its own where they would be."""
    package = Path(kernels.__file__).parents[1]
    ignored = shutil.ignore_patterns("_native*", "__pycache__")
    ops_folder = shutil.copytree(package, folder / "mlx_esm_hf", ignore=ignored) / "ops"
    for name, text in files.items():
        (ops_folder / name).write_text(text)
    return folder


@pytest.mark.skipif(sys.platform != "linux" or mx.is_available(mx.gpu), reason="for Linux without a GPU")
def test_missing_kernels_are_told_once(tmp_path):
    folder = without_kernels(tmp_path)
    told = python(SHOW_STATE, folder, PYTHONWARNINGS="always")
    _, state = told.stdout.splitlines()
    assert state.startswith("off: not built; install mlx-esm-hf again") and "g++" in state and "python3-dev" in state
    assert told.stderr.count("RuntimeWarning") == told.stderr.count(f"The kernels for CPUs are {state}.") == 1
    importing = python("import mlx_esm_hf.ops.kernels", folder, PYTHONWARNINGS="always")
    chosen = python(SHOW_STATE, folder, PYTHONWARNINGS="always", MLX_ESM_KERNELS="0")
    assert "kernels" not in importing.stderr + chosen.stderr and chosen.returncode == importing.returncode == 0


WRONG_NUMBERS = "import mlx.core as mx\nuse_threads = linear = lambda *arguments: mx.array(10.5)"


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("_native.so", "of another machine", "ImportError: "),
        ("_native.py", "", "AttributeError: "),
        ("_native.py", WRONG_NUMBERS, "ArithmeticError: 1 · 3 + 2 · 4 is 11, not 10.5"),
    ],
    ids=["no library", "nothing in it", "wrong numbers"],
)
def test_a_module_that_does_not_work_is_left_out(tmp_path, file, content, reason):
    """It is noticed when the module is loaded, and models are computed without it."""
    files = {"_native.json": kernels.BUILD.read_text(), file: content}
    process = python(SHOW_STATE, without_kernels(tmp_path, **files))
    assert process.returncode == 0, process.stderr
    _, state = process.stdout.splitlines()
    assert state.startswith(f"off: they do not work here ({reason}") and "install mlx-esm-hf again" in state
    assert state in process.stderr


def test_mapped(tmp_path: Path) -> None:
    """The numbers of a file, wherever in a page they lie; what it does not hold is refused."""
    values = np.arange(5000, dtype=np.float32)
    path = str(tmp_path / "numbers")
    for shift in (8, 12, 4092, 4096, 4100, 8192):
        Path(path).write_bytes(bytes(shift) + values.tobytes())
        array = native.mapped(path, shift, [50, 100], mx.float32)
        assert array.shape == (50, 100) and np.array_equal(np.array(array).flatten(), values)
        assert np.array_equal(np.array(array * 2 + array), 3 * values.reshape(50, 100))
    for offset, shape in ((0, [1]), (4, [1]), (8196, [5000]), (8192, [5001]), (8192, [0]), (1 << 40, [1])):
        with pytest.raises(ValueError, match="the file has no such part"):
            native.mapped(path, offset, shape, mx.float32)
    with pytest.raises(ValueError, match="the numbers are not aligned"):
        native.mapped(path, 8194, [1], mx.float32)
    with pytest.raises(RuntimeError, match=r"nowhere: No such file or directory"):
        native.mapped(str(tmp_path / "nowhere"), 8, [1], mx.float32)
    assert np.array_equal(np.array(array).flatten(), values)
