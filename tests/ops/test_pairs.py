"""Operations on pairs and their gradients, with each instruction set and without kernels, against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_esm_hf.ops import kernels, pairs
from mlx_esm_hf.ops.pairs import Affine
from tests.bar import hold_to_bar

F = torch.nn.functional
B, C, OUTPUTS = 2, 24, 20
SETS = kernels.native.instruction_sets() if kernels.native else []


@pytest.fixture(params=[*SETS, "plain"], autouse=True)
def backend(request: pytest.FixtureRequest, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Use the kernels of an instruction set, or none."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "native", None)
        yield
        return
    before = kernels.native.instruction_set()
    kernels.native.choose(request.param)
    yield
    kernels.native.choose(before)


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def norm(seed: int) -> list[np.ndarray]:
    return [1 + numbers(C, seed=seed, scale=0.2), numbers(C, seed=seed + 1, scale=0.2)]


def layer(outputs: int, inputs: int, seed: int) -> list[np.ndarray]:
    return [numbers(outputs, inputs, seed=seed, scale=inputs**-0.5), numbers(outputs, seed=seed + 1, scale=0.1)]


def normed(x: Any, weight: Any, bias: Any) -> Any:
    return F.layer_norm(x, (C,), weight, bias, pairs.EPS)


def check(ours: Callable[..., mx.array], theirs: Callable[..., torch.Tensor], inputs: list[np.ndarray]) -> None:
    """Compare the output and the gradient of each input."""
    expected = []
    for dtype in (torch.float32, torch.float64):
        tensors = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in inputs]
        output = theirs(*tensors)
        dy = numbers(*output.shape, seed=99)
        gradients = torch.autograd.grad(output, tensors, torch.tensor(dy, dtype=dtype))
        expected.append([output.detach(), *gradients])

    def loss(*x: mx.array) -> tuple[mx.array, mx.array]:
        y = ours(*x)
        return (y * mx.array(dy)).sum(), y

    (_, output), found = mx.value_and_grad(loss, argnums=list(range(len(inputs))))(*map(mx.array, inputs))
    hold_to_bar(output, expected[0][0], expected[1][0], "output")
    scale = max(float(x.abs().max()) for x in expected[1][1:])
    for i, (gradient, *bars) in enumerate(zip(found, expected[0][1:], expected[1][1:], strict=True)):
        hold_to_bar(gradient, *bars, label=f"gradient {i}", scale=scale)


@pytest.mark.parametrize("length", [1, 7, 19])
@pytest.mark.parametrize("with_x", [False, True])
@pytest.mark.parametrize("channels_first", [False, True])
def test_gated_linear(length, with_x, channels_first):
    inputs = [numbers(B, length, length, C), *norm(1), *layer(OUTPUTS, C, 3), *layer(OUTPUTS, C, 5)]
    mask = numbers(B, length, length, seed=7)
    inputs += [numbers(C, B, length, length, seed=9), *norm(10)] if with_x else []
    residual = None if channels_first else numbers(B, length, length, OUTPUTS, seed=8)

    def ours(z, w, b, g, gb, p, pb, x=None, xw=None, xb=None):
        added = None if residual is None else mx.array(residual)
        return pairs.gated_linear(
            z, Affine(w, b), Affine(g, gb), Affine(p, pb), x, Affine(xw, xb), mx.array(mask), added, channels_first
        )

    def theirs(z, w, b, g, gb, p, pb, x=None, xw=None, xb=None):
        z = normed(z, w, b)
        x = z if x is None else normed(x.movedim(0, -1), xw, xb)
        y = F.linear(x, p, pb) * torch.sigmoid(F.linear(z, g, gb)) * torch.tensor(mask, dtype=z.dtype)[..., None]
        return y.movedim(-1, 0) if residual is None else y + torch.tensor(residual, dtype=z.dtype)

    check(ours, theirs, inputs)


@pytest.mark.parametrize("length", [1, 2, 9, 21])
@pytest.mark.parametrize("ending", [False, True])
@pytest.mark.parametrize("rows", [None, 2])
def test_triangle_attention(length, ending, rows):
    heads = 3
    matrices = [numbers(n, C, seed=n + i, scale=C**-0.5) for i, n in enumerate([heads, C, C, C])]
    z, residual = (numbers(B, length, length, C, seed=seed) for seed in (0, 50))
    inputs = [z, *norm(1), *matrices, *layer(C, C, 3), *layer(C, C, 5), residual]
    mask = np.ones((B, length), np.float32)
    mask[1, length // 2 + 1 :] = 0

    def ours(z, w, b, bias, q, k, v, g, gb, o, ob, residual):
        layers = Affine(w, b), bias, q, k, v, Affine(g, gb), Affine(o, ob)
        return pairs.triangle_attention(z, mx.array(mask), *layers, residual, ending, rows)

    def theirs(z, w, b, bias, q, k, v, g, gb, o, ob, residual):
        z = normed(z.transpose(1, 2) if ending else z, w, b)
        q, k, v = (F.linear(z, x).unflatten(-1, (heads, -1)).transpose(2, 3) for x in (q, k, v))
        scores = (q @ k.mT) * (C // heads) ** -0.5 + F.linear(z, bias).permute(0, 3, 1, 2)[:, None]
        scores = scores.masked_fill(torch.tensor(mask == 0)[:, None, None, None], -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(2, 3).flatten(3) * torch.sigmoid(F.linear(z, g, gb))
        y = F.linear(y, o, ob)
        return (y.transpose(1, 2) if ending else y) + residual

    check(ours, theirs, inputs)


@pytest.mark.parametrize("length", [1, 6, 33])
@pytest.mark.parametrize("rows", [None, 2])
def test_transition(length, rows):
    x, residual = (numbers(B, length, length, C, seed=seed) for seed in (0, 50))
    inputs = [x, *norm(1), *layer(4 * C, C, 3), *layer(C, 4 * C, 5), residual]

    def ours(x, w, b, e, eb, s, sb, residual):
        return pairs.transition(x, Affine(w, b), Affine(e, eb), Affine(s, sb), residual, rows)

    def theirs(x, w, b, e, eb, s, sb, residual):
        return F.linear(F.relu(F.linear(normed(x, w, b), e, eb)), s, sb) + residual

    check(ours, theirs, inputs)


def test_few_rows_at_a_time(monkeypatch):
    """Computing a few rows at a time gives the same result."""
    z = mx.array(numbers(B, 9, 9, C))
    layers = [Affine(*map(mx.array, x)) for x in (norm(1), layer(C, C, 3), layer(C, C, 5))]
    whole = pairs.gated_linear(z, *layers)
    monkeypatch.setattr(pairs, "ELEMENTS_AT_A_TIME", 1)
    assert mx.allclose(pairs.gated_linear(z, *layers), whole, atol=1e-6)


def test_half_precision_through_float32():
    """The kernels round once, at the end."""
    kernels.native or pytest.skip("without kernels")
    z = mx.array(numbers(B, 9, 9, C)).astype(mx.bfloat16)
    layers = [Affine(*(mx.array(x).astype(mx.bfloat16) for x in y)) for y in (norm(1), layer(C, C, 3), layer(C, C, 5))]
    layers32 = [Affine(*(x.astype(mx.float32) for x in y)) for y in layers]
    found, wanted = pairs.gated_linear(z, *layers), pairs.gated_linear(z.astype(mx.float32), *layers32)
    assert found.dtype == mx.bfloat16
    assert mx.allclose(found.astype(mx.float32), wanted, rtol=2**-8, atol=1e-6)


def test_wrong_shapes_are_rejected():
    z, (w, b), (p, pb) = mx.zeros((1, 3, 3, C)), map(mx.array, norm(1)), map(mx.array, layer(C, C, 3))
    native = kernels.native or pytest.skip("without kernels")
    n, a = (w, b, pairs.EPS), (p, pb)
    for call, message in [
        (lambda: native.gated_linear(z, n, a, (p[:, 1:], pb)), "z and layer do not fit"),
        (lambda: native.gated_linear(z, n, (p[1:], pb), a), "layer and gate do not fit"),
        (lambda: native.gated_linear(z, (w[1:], b, 1e-5), a, a), "norm does not fit"),
        (lambda: native.gated_linear(z, n, a, a, z.T, None), "x and x_norm come together"),
        (lambda: native.gated_linear(z, n, a, a, z, n), "x does not fit"),
        (lambda: native.gated_linear(z, n, a, a, mask=mx.ones(8)), "mask does not fit"),
        (lambda: native.gated_linear(z, n, a, a, residual=z, y_first=True), "residual does not fit"),
        (lambda: native.triangle_attention(z, mx.ones((1, 4)), n, p[:3], p, p, p, a, a), "mask does not fit"),
        (lambda: native.triangle_attention(z, mx.ones((1, 3)), n, p[:5], p, p, p, a, a), "bias does not fit"),
        (lambda: native.triangle_attention(z[:, 1:], mx.ones((1, 2)), n, p[:3], p, p, p, a, a), "not .B, L, L, C"),
        (lambda: native.transition(z, n, a, (p[1:], pb)), "expand and shrink do not fit"),
        (lambda: native.transition(z.astype(mx.float16), n, a, a), "float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFFFFFFF, 0x7F800000], ids=["nan", "nan with a payload", "inf"])
def test_nan_and_infinity_are_not_swallowed(bits):
    """NaN in any parameter makes the result NaN. An infinite gate or ReLU may saturate, as in torch."""
    L, spoilt = 3, np.uint32(bits).view(np.float32)
    z, mask = numbers(1, L, L, C), np.ones((1, L, L), np.float32)
    affine = [norm(1), layer(C, C, 3), layer(C, C, 5)]
    projections = [numbers(C, C, seed=7 + i, scale=C**-0.5) for i in range(3)]
    operations = {
        "gated linear": (lambda z, n, g, y: pairs.gated_linear(z, n, g, y, mask=mx.array(mask)), affine),
        "transition": (lambda z, n, e, s: pairs.transition(z, n, e, s), affine),
        "triangle attention": (
            lambda z, n, g, o, b, q, k, v: pairs.triangle_attention(z, mx.array(mask[:, 0]), n, b, q, k, v, g, o),
            [*affine, numbers(2, C, seed=12), *projections],
        ),
    }
    for name, (operation, parameters) in operations.items():
        flat = [x for p in parameters for x in (p if isinstance(p, list) else [p])]
        for place, parameter in enumerate(flat):
            before = parameter.flat[0]
            parameter.flat[0] = spoilt
            arguments = [Affine(*map(mx.array, p)) if isinstance(p, list) else mx.array(p) for p in parameters]
            finite = mx.isfinite(operation(mx.array(z), *arguments)).all().item()
            parameter.flat[0] = before
            assert not finite or np.isinf(spoilt), (name, place)


@pytest.mark.parametrize("outgoing", [True, False])
def test_triangle_multiplication(outgoing: bool) -> None:
    """Both directions, with padding, in groups of channels."""
    L = 7
    mask = (np.arange(L) < np.array([[7], [5]])).astype(np.float32)
    inputs = [numbers(B, L, L, C), mask, *norm(1), *layer(C, C, 3), *layer(C, C, 5), *layer(C, C, 7), *layer(C, C, 9)]
    inputs += [*norm(11), *layer(C, C, 13), *layer(C, C, 15)]

    def ours(z: mx.array, mask: mx.array, *parameters: mx.array) -> mx.array:
        n, gate_a, a, gate_b, b, x_norm, gate, out = (Affine(*parameters[i : i + 2]) for i in range(0, 16, 2))
        return pairs.triangle_multiplication(z, mask, n, (gate_a, a), (gate_b, b), x_norm, (gate, out), outgoing, z)

    def theirs(z: torch.Tensor, mask: torch.Tensor, *p: torch.Tensor) -> torch.Tensor:
        y, both = normed(z, *p[:2]), (mask[:, :, None] * mask[:, None])[..., None]
        a = F.linear(y, *p[4:6]) * torch.sigmoid(F.linear(y, *p[2:4])) * both
        b = F.linear(y, *p[8:10]) * torch.sigmoid(F.linear(y, *p[6:8])) * both
        x = torch.einsum("bikc,bjkc->bijc" if outgoing else "bkic,bkjc->bijc", a, b)
        return z + F.linear(normed(x, *p[10:12]), *p[14:16]) * torch.sigmoid(F.linear(y, *p[12:14]))

    check(ours, theirs, inputs)


@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("width", [11, 70])
def test_gated_transition(tokens: int, width: int) -> None:
    """SwiGLU in place of ReLU, for hidden widths of less and of more than one block."""
    inputs = [
        numbers(1, tokens, C),
        *norm(1),
        *layer(2 * width, C, 3),
        *layer(C, width, 5),
        numbers(1, tokens, C, seed=9),
    ]

    def ours(x: mx.array, *p: mx.array) -> mx.array:
        return pairs.transition(x, Affine(*p[:2]), Affine(*p[2:4]), Affine(*p[4:6]), p[6], gated=True)

    def theirs(x: torch.Tensor, *p: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(normed(x, *p[:2]), *p[2:4]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, *p[4:6]) + p[6]

    check(ours, theirs, inputs)
