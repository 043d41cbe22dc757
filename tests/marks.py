"""Marks that tests of several parts carry."""

import pytest

from mlx_esm_hf.ops import kernels

needs_kernels = pytest.mark.skipif(kernels.native is None, reason=f"the kernels are {kernels.STATE}")
