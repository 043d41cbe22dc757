"""Memory-mapped arrays."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.marks import needs_kernels
from tests.ops.reference import native

pytestmark = [needs_kernels, pytest.mark.usefixtures("on_cpu")]


def test_mapped(tmp_path: Path) -> None:
    """Arrays may begin anywhere in a page. Parts outside the file are rejected."""
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
