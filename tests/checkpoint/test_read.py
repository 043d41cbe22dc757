"""Files of weights, whole and broken. The reader of `.bin` has tests of its own."""

import gc
import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_esm_hf.checkpoint.mapped import MAPPED_FROM
from mlx_esm_hf.checkpoint.read import load_file, load_files
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.ops import kernels
from tests.marks import needs_kernels

STATE = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "ids": np.arange(4)}


@pytest.fixture
def path(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def header_length(raw):
    return 8 + int.from_bytes(raw[:8], "little")


def test_whole(path):
    arrays = load_file(path)
    assert arrays.keys() == STATE.keys()
    assert all(np.array_equal(np.array(arrays[key]), STATE[key]) for key in STATE)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"])
def test_dtypes(dtype, tmp_path):
    """As safetensors' own writer for torch stores them, bit for bit."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensor = (torch.arange(-3, 5) * 0.3).to(getattr(torch, dtype))
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    array = load_file(tmp_path / "model.safetensors")["x"]
    assert str(array.dtype) == f"mlx.core.{dtype}"
    assert np.array(array.view(mx.uint8)).tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_cut_off_anywhere(path):
    raw = path.read_bytes()
    for length in (0, 1, 7, 8, 9, header_length(raw) - 1, header_length(raw), header_length(raw) + 1, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=f"{path} is not a whole safetensors file .* Download it again"):
            load_file(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"\0" * 100,
        b"\xff" * 100,
        b"<!DOCTYPE html><html>Not found</html>",
        (20).to_bytes(8, "little") + b"{" * 20,
        (2).to_bytes(8, "little") + b"{}" + b"more",
    ],
)
def test_garbage(raw, path):
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"{path} is not a whole safetensors file .* Download it again"):
        load_file(path)


def test_git_lfs_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 31000000\n")
    with pytest.raises(CheckpointError, match=f"{path} .* Git LFS pointer, not the weights: .*`git lfs pull`"):
        load_file(path)


def test_dtype_that_mlx_has_not(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": np.ones(3, np.float64)}, path)
    with pytest.raises(CheckpointError, match=f"{path}: MLX cannot read it .*F64.* Convert it to float32"):
        load_file(path)


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_file(tmp_path / "model.safetensors")


def test_files_together(path, tmp_path):
    save_file({"other": np.ones(2, np.float32)}, tmp_path / "2.safetensors")
    assert load_files([str(path), str(tmp_path / "2.safetensors")]).keys() == STATE.keys() | {"other"}
    save_file({"weight": np.ones(2, np.float32)}, tmp_path / "2.safetensors")
    with pytest.raises(CheckpointError, match="2.safetensors holds 'weight' again"):
        load_files([str(path), str(tmp_path / "2.safetensors")])


# Large arrays, which are mapped where there are kernels

NUMBERS = np.arange(MAPPED_FROM // 4, dtype=np.float32).reshape(4, -1)


def mappings(path):
    return Path("/proc/self/maps").read_text().count(str(path))


def write_shifted(path, shift):
    """A file in which the large array begins `shift` bytes later than it need."""
    header = {
        "small": {"dtype": "U8", "shape": [shift], "data_offsets": [0, shift]},
        "large": {"dtype": "F32", "shape": NUMBERS.shape, "data_offsets": [shift, shift + NUMBERS.nbytes]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(shift) + NUMBERS.tobytes())


@needs_kernels
def test_large_arrays_are_mapped(tmp_path):
    """As long as somebody has them; small ones are read."""
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
    tensor = (100 * torch.rand(MAPPED_FROM)).to(getattr(torch, dtype))
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    array = load_file(tmp_path / "model.safetensors")["x"]
    assert str(array.dtype) == f"mlx.core.{dtype}"
    assert np.array(array.view(mx.uint8)).tobytes() == tensor.view(torch.uint8).numpy().tobytes()


@needs_kernels
@pytest.mark.parametrize(("shift", "mapped"), [(0, 1), (1, 0), (2, 0), (4, 1), (6, 0), (5000, 1)])
def test_numbers_that_are_not_aligned_are_read(shift, mapped, tmp_path):
    write_shifted(tmp_path / "model.safetensors", shift)
    arrays = load_file(tmp_path / "model.safetensors")
    assert mappings(tmp_path / "model.safetensors") == mapped
    assert np.array_equal(np.array(arrays["large"]), NUMBERS)


def test_without_kernels_all_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "native", None)
    save_file({"a": NUMBERS}, tmp_path / "model.safetensors")
    arrays = load_file(tmp_path / "model.safetensors")
    assert np.array_equal(np.array(arrays["a"]), NUMBERS)


def test_a_file_that_is_written_anew(tmp_path):
    """Another file in its place changes nothing of what is loaded, and neither does who writes into the arrays of the
    file."""
    path = tmp_path / "model.safetensors"
    save_file({"a": NUMBERS}, path)
    array = load_file(path)["a"]
    save_file({"a": NUMBERS + 1}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    assert np.array_equal(np.array(array), NUMBERS)
    again = load_file(path)["a"]
    np.array(again, copy=False)[:] = 0
    assert not again.any() and np.array_equal(np.array(load_file(path)["a"]), NUMBERS + 1)
