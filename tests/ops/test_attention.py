"""The kernel of attention, with each instruction set of this machine."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.marks import needs_kernels
from tests.ops.reference import (
    RAGGED,
    attention_inputs,
    check,
    check_gradients,
    native,
    numbers,
    plain,
    run_python,
    tensor,
    torch_attention,
)

pytestmark = [needs_kernels, pytest.mark.usefixtures("on_cpu")]
every_set = pytest.mark.usefixtures("instructions")
wrappings = pytest.mark.parametrize("wrap", [plain, mx.compile, mx.checkpoint], ids=["plain", "compile", "checkpoint"])
OPTIONS = ["", "mask", "rotary", "mask rotary", "learned", "mask learned", "rotary norms", "mask norms"]
BIASED = ["bias", "one bias", "mask bias", "rotary one bias", "mask rotary bias"]


def check_attention(heads: int, head_dim: int, offsets: list[int], options: str = "", scale: float = 1.0) -> None:
    inputs, more = attention_inputs(heads, head_dim, offsets, options, scale)
    names = "mask", "cos", "sin", "bias_k", "bias_v", "bias", "query_norm", "key_norm"
    bound = [*inputs, heads, offsets, *map(more.get, names)]
    check(native.attention, torch_attention, *bound)


@every_set
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("head_dim", [7, 16, 20, 24, 32, 64, 75])
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
def test_bias_of_minus_infinity_hides_keys():
    """-inf in the bias hides a key from a query, as the mask hides it from all queries."""
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
    # All keys of the second sequence are hidden: they get equal weights, as with MLX's own operations.
    value = mx.array(numbers(9, 6))
    out = native.attention(value, value, value, 2, [0, 4, 9], mx.array([True] * 4 + [False] * 5))
    np.testing.assert_allclose(np.array(out)[4:], np.tile(np.array(value)[4:].mean(0), (5, 1)), atol=1e-6)


@every_set
@pytest.mark.parametrize("keys", [3, 300], ids=["one block of keys", "several"])
def test_scores_of_minus_infinity(keys):
    """If all scores of a query are -inf, its result is NaN, as in torch. One finite score is enough for a result."""
    key, value = np.ones((keys, 8), np.float32), numbers(keys, 8)
    query = np.ones((keys, 8), np.float32)
    query[0, 0] = -np.inf
    attend = functools.partial(native.attention, heads=1, offsets=[0, keys])
    found = np.array(attend(mx.array(query), mx.array(key), mx.array(value)))
    assert np.isnan(found[0]).all() and np.isfinite(found[1:]).all()
    key[-1, 0] = -1  # now a score is +inf
    assert np.isnan(np.array(attend(mx.array(query), mx.array(key), mx.array(value)))[0]).all()
    bias = np.full((1, 1, keys, keys), -np.inf, np.float32)
    bias[..., -1] = 0
    ones = mx.ones((keys, 8))
    found = np.array(attend(ones, ones, mx.array(value), bias=mx.array(bias)))
    np.testing.assert_allclose(found, np.tile(value[-1], (keys, 1)), rtol=1e-6)


@every_set
@pytest.mark.parametrize("options", OPTIONS)
def test_results_do_not_depend_on_the_batch(options):
    offsets = [0, 1, 1, 18, 258, 600]
    inputs, more = attention_inputs(2, 20, offsets, options)

    def attend(part: slice, offsets: list[int], inputs: list[np.ndarray] = inputs) -> np.ndarray:
        rest = {n: mx.array(x[part] if n in ("mask", "cos", "sin") else x) for n, x in more.items()}
        return np.array(native.attention(*(mx.array(x[part]) for x in inputs), 2, offsets, **rest))

    together = attend(slice(None), offsets)
    for start, end in itertools.pairwise(offsets):
        assert np.array_equal(attend(slice(start, end), [0, end - start]), together[start:end])
    nan_with_payload = np.uint32(0xFFFFFFFF).view(np.float32)
    for spoilt, bad in itertools.product(range(3), (np.nan, np.inf, nan_with_payload)):
        x = [i.copy() for i in inputs]
        x[spoilt][18] = bad  # this token is never hidden
        found = attend(slice(None), offsets, x)
        assert np.array_equal(found[:18], together[:18]) and np.array_equal(found[258:], together[258:])
        assert not np.isfinite(found[18:258]).all()


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
@pytest.mark.parametrize(("head_dim", "length"), [(7, 33), (16, 1), (64, 17), (24, 700), (40, 255), (75, 33)])
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
    mx.eval([mx.full((4, 16), np.nan) for _ in range(50)])  # their memory is used again
    check_attention_gradients(2, 8, [0, 3, 3, 3, 20], options)


def test_checkpoint_with_mask_and_angles_as_arguments():
    """mx.checkpoint requests the gradients of all arguments, including those that have none."""
    code = """
import mlx.core as mx
from mlx_esm_hf.ops.kernels import native
mx.random.seed(0)
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
    plain, checkpointed = (mx.grad(lambda x: (g(x, *more) ** 2).sum())(x) for g in (f, mx.checkpoint(f)))
    assert mx.allclose(plain, checkpointed, rtol=1e-4, atol=1e-5), (plain, checkpointed)
"""
    process = run_python(code)
    assert process.returncode == 0, process.stderr
