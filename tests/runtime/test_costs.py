"""Batch costs per device."""

import mlx.core as mx
import pytest

from mlx_esm_hf.runtime import costs


@pytest.mark.parametrize(("device", "expected"), [(mx.cpu, costs.CPU), (mx.gpu, costs.GPU)], ids=["cpu", "gpu"])
def test_costs_are_those_of_the_default_device(device, expected, monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    assert costs.costs() == expected
    assert all(isinstance(cost, int) and cost > 0 for cost in expected)
