"""Large arrays of safetensors files are mapped if there are kernels."""

import gc
import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_esm_hf.checkpoint.mapped import MIN_MAPPED_BYTES
from mlx_esm_hf.checkpoint.read import load_file
from mlx_esm_hf.ops import kernels
from tests.marks import needs_kernels

NUMBERS = np.arange(MIN_MAPPED_BYTES // 4, dtype=np.float32).reshape(4, -1)


def mappings(path):
    return Path("/proc/self/maps").read_text().count(str(path))


def write_shifted(path, shift):
    """Write a file in which a small array of `shift` bytes precedes the large array."""
    header = {
        "small": {"dtype": "U8", "shape": [shift], "data_offsets": [0, shift]},
        "large": {"dtype": "F32", "shape": NUMBERS.shape, "data_offsets": [shift, shift + NUMBERS.nbytes]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(shift) + NUMBERS.tobytes())


@needs_kernels
def test_large_arrays_are_mapped(tmp_path):
    """The mapping ends with the array. Small arrays are read."""
    path = tmp_path / "model.safetensors"
    save_file({"a": NUMBERS, "b": NUMBERS + 1, "small": NUMBERS[0, :9]}, path)
    arrays = load_file(path)
    assert mappings(path) == 2
    assert np.array_equal(np.array(arrays["a"]), NUMBERS) and np.array_equal(np.array(arrays["small"]), NUMBERS[0, :9])
    assert np.array_equal(np.array(arrays.pop("b") - arrays["a"]), np.ones_like(NUMBERS))
    gc.collect()
    assert mappings(path) == 1
    del arrays
    gc.collect()
    assert mappings(path) == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int64", "uint32", "uint8", "bool"])
def test_large_arrays_of_each_dtype(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensor = (100 * torch.rand(MIN_MAPPED_BYTES)).to(getattr(torch, dtype))
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    array = load_file(tmp_path / "model.safetensors")["x"]
    assert str(array.dtype) == f"mlx.core.{dtype}"
    assert np.array(array.view(mx.uint8)).tobytes() == tensor.view(torch.uint8).numpy().tobytes()


@needs_kernels
@pytest.mark.parametrize(("shift", "mapped"), [(0, 1), (1, 0), (2, 0), (4, 1), (6, 0), (5000, 1)])
def test_arrays_that_are_not_aligned_are_read(shift, mapped, tmp_path):
    write_shifted(tmp_path / "model.safetensors", shift)
    arrays = load_file(tmp_path / "model.safetensors")
    assert mappings(tmp_path / "model.safetensors") == mapped
    assert np.array_equal(np.array(arrays["large"]), NUMBERS)


def test_without_kernels_all_arrays_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "native", None)
    save_file({"a": NUMBERS}, tmp_path / "model.safetensors")
    arrays = load_file(tmp_path / "model.safetensors")
    assert np.array_equal(np.array(arrays["a"]), NUMBERS)


def test_replacing_the_file(tmp_path):
    """Replacing the file does not change loaded arrays, and writing into a loaded array does not change the file."""
    path = tmp_path / "model.safetensors"
    save_file({"a": NUMBERS}, path)
    array = load_file(path)["a"]
    save_file({"a": NUMBERS + 1}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    assert np.array_equal(np.array(array), NUMBERS)
    reloaded = load_file(path)["a"]
    np.array(reloaded, copy=False)[:] = 0
    assert not reloaded.any() and np.array_equal(np.array(load_file(path)["a"]), NUMBERS + 1)
