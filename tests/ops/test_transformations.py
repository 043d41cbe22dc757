"""All kernels under MLX's transformations, in threads, with unusual memory layouts and without tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
import torch

from tests.marks import needs_kernels
from tests.ops.reference import (
    EPS,
    RAGGED,
    F,
    attention_inputs,
    native,
    norm,
    numbers,
    run_python,
    torch_layer_norm,
    torch_linear,
    torch_softmax,
    torch_swiglu,
)

pytestmark = [needs_kernels, pytest.mark.usefixtures("on_cpu")]
every_set = pytest.mark.usefixtures("instructions")


def operations() -> list[tuple[Callable[..., mx.array], list[mx.array]]]:
    """Return functions and their arguments."""
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

    for batched in range(len(arguments)):  # a batch of this argument; below, of all
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
def test_bitwise_identical_lazily_on_streams_and_compiled(i):
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
    """The call returns or raises, but does not crash."""
    process = run_python("""
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
