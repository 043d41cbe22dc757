"""Fixtures for tests of kernels."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from mlx_esm_hf.ops import kernels


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """Make the CPU MLX's default device."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@pytest.fixture(params=kernels.native.instruction_sets() if kernels.native else [])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Select each instruction set of this machine."""
    before = kernels.native.instruction_set()
    kernels.native.choose(request.param)
    yield request.param
    kernels.native.choose(before)
