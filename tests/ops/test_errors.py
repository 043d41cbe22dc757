"""Errors of the kernels: wrong arguments and lack of memory."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tests.marks import needs_kernels
from tests.ops.reference import (
    EPS,
    native,
    run_python,
)

pytestmark = [needs_kernels, pytest.mark.usefixtures("on_cpu")]
OF_STEP = mx.array(1.0), mx.array(0.1), mx.array(1, mx.uint64)  # scale, learning rate and step of AdamW


@pytest.mark.parametrize(
    ("operands", "error"),
    [("x, w", "std::bad_alloc"), ("column, column", "there is no memory for a result of 17592186044416 bytes")],
    ids=["of scratch", "of the result"],
)
def test_lack_of_memory_raises_and_frees_the_queue(operands, error):
    """There are more failures than the queue has places."""
    process = run_python(f"""
import resource
from pathlib import Path
import mlx.core as mx
from mlx_esm_hf.ops.kernels import native

mx.set_default_device(mx.cpu)
x, w = mx.zeros((16, 1 << 21)), mx.zeros((1, 1 << 21))  # 128 MB of it are packed
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
