"""Free memory, also on devices that this machine does not have."""

import mlx.core as mx
import pytest

from mlx_esm_hf.runtime import memory

GIB = 1 << 30
# What `mx.device_info` returns there, and the free memory.
DEVICES = {
    "Metal": ({"memory_size": 16 * GIB, "max_recommended_working_set_size": 12 * GIB}, 15 * GIB),
    "CUDA": ({"total_memory": 80 * GIB, "free_memory": 10 * GIB}, 10 * GIB),
    "CUDA without free memory": ({"total_memory": 80 * GIB}, 79 * GIB),
}


@pytest.mark.parametrize(("info", "free"), DEVICES.values(), ids=DEVICES)
def test_free_memory_of_a_gpu(info, free, monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "get_active_memory", lambda: GIB)
    assert memory.free_memory() == free
    assert memory.batch_tokens(1280) == min(free // (8 * 16 * 4 * 1280), 16384)


def test_free_memory_of_this_device():
    assert 256 <= memory.batch_tokens(320) <= 16384 and memory.free_memory() > 0
