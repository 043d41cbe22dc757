"""Reading weights from safetensors files, intact and broken. Tests of `.bin` are in test_torch_bin."""

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_esm_hf.checkpoint.read import load_file, load_files
from mlx_esm_hf.errors import CheckpointError

STATE = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "ids": np.arange(4)}


@pytest.fixture
def path(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def header_length(raw):
    return 8 + int.from_bytes(raw[:8], "little")


def test_intact_file(path):
    arrays = load_file(path)
    assert arrays.keys() == STATE.keys()
    assert all(np.array_equal(np.array(arrays[key]), STATE[key]) for key in STATE)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"])
def test_dtypes(dtype, tmp_path):
    """Arrays are bitwise those that safetensors wrote for torch."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensor = (torch.arange(-3, 5) * 0.3).to(getattr(torch, dtype))
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    array = load_file(tmp_path / "model.safetensors")["x"]
    assert str(array.dtype) == f"mlx.core.{dtype}"
    assert np.array(array.view(mx.uint8)).tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_truncated_anywhere(path):
    raw = path.read_bytes()
    for length in (0, 1, 7, 8, 9, header_length(raw) - 1, header_length(raw), header_length(raw) + 1, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=f"{path} is not a complete safetensors file .* Download it again"):
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
    with pytest.raises(CheckpointError, match=f"{path} is not a complete safetensors file .* Download it again"):
        load_file(path)


def test_git_lfs_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 31000000\n")
    with pytest.raises(CheckpointError, match=f"{path} .* Git LFS pointer, not the weights: .*`git lfs pull`"):
        load_file(path)


def test_dtype_that_mlx_lacks(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": np.ones(3, np.float64)}, path)
    with pytest.raises(CheckpointError, match=f"{path} cannot be read by MLX .*F64.* Convert it to float32"):
        load_file(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_file(tmp_path / "model.safetensors")


def test_several_files(path, tmp_path):
    save_file({"other": np.ones(2, np.float32)}, tmp_path / "2.safetensors")
    assert load_files([str(path), str(tmp_path / "2.safetensors")]).keys() == STATE.keys() | {"other"}
    save_file({"weight": np.ones(2, np.float32)}, tmp_path / "2.safetensors")
    with pytest.raises(
        CheckpointError, match="2.safetensors contains 'weight', which an earlier shard already contains"
    ):
        load_files([str(path), str(tmp_path / "2.safetensors")])
