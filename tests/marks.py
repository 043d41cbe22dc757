"""Marks shared by tests of several packages."""

import mlx.core as mx
import pytest

from mlx_esm_hf.ops import kernels

needs_cpu = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="tests CPU behaviour")
needs_kernels = pytest.mark.skipif(kernels.native is None, reason=f"the kernels are {kernels.STATE}")
