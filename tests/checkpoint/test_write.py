"""Writing weights to safetensors files."""

import json

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mlx_esm_hf.checkpoint.read import load_files
from mlx_esm_hf.checkpoint.resolve import shard_names
from mlx_esm_hf.checkpoint.write import save_safetensors, stale_weights, write_safetensors
from mlx_esm_hf.runtime.files import replace_files
from tests.marks import needs_cpu

STATE = {f"layer.{i}": mx.full((256,), i, dtype=mx.float32) for i in range(5)}  # 1 KiB each


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["50GB", "3KB", 2048, 1024, 1])
def test_save(size, variant, tmp_path):
    """Write one file, or shards of at most the requested size and an index of all keys."""
    files = save_safetensors(dict(STATE), tmp_path, size, variant)
    assert set(files) == content(tmp_path).keys()
    assert all(variant is None or variant in file for file in files)
    paths = [str(tmp_path / file) for file in files if file.endswith("safetensors")]
    loaded = load_files(paths)
    assert loaded.keys() == STATE.keys() and all(mx.array_equal(loaded[key], STATE[key]) for key in STATE)
    for path in paths:
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
    if size == "50GB":
        assert files == ["model.fp16.safetensors" if variant else "model.safetensors"]
        return
    shards, name = files[:-1], "model.safetensors.index.fp16.json" if variant else "model.safetensors.index.json"
    assert len(shards) == (3 if size in ("3KB", 2048) else 5) and files[-1] == name
    index = json.loads((tmp_path / name).read_text())
    assert shard_names(str(tmp_path / name)) == sorted(shards)
    assert index["weight_map"].keys() == STATE.keys() and index["metadata"]["total_size"] == 5 * 1024


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_not_contiguous(dtype, tmp_path):
    """Transposed and broadcast arrays are written with their visible elements."""
    state = {
        "transposed": mx.arange(6).reshape(2, 3).T.astype(dtype),
        "view": mx.arange(6).reshape(2, 3).T,
        "broadcast": mx.broadcast_to(mx.array([1.5], dtype), (3,)),
        "slice": mx.arange(10)[2:8:2],
        "scalar": mx.array(2.5, dtype),
    }
    save_safetensors(dict(state), tmp_path, "50GB")
    loaded = load_files([str(tmp_path / "model.safetensors")])
    for name, array in state.items():
        assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
        assert np.array_equal(np.array(loaded[name].astype(mx.float32)), np.array(array.astype(mx.float32))), name


def test_arrays_are_aligned(tmp_path):
    """Arrays of all item sizes are aligned in the file."""
    state = {
        "odd": mx.ones(3, mx.uint8),
        "a": mx.array([1.5, 2, 3]),
        "half": mx.array([1.5, 2, 3], mx.bfloat16),
        "single": mx.array(7, mx.int64),
        "b": mx.array([4.5]),
        "even": mx.arange(8).astype(mx.float16),
    }
    write_safetensors(tmp_path / "model.safetensors", dict(state))
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    start = len(raw) - sum(array.nbytes for array in state.values())
    for name, array in state.items():
        assert (start + header[name]["data_offsets"][0]) % array.itemsize == 0, name
    loaded = load_files([str(tmp_path / "model.safetensors")])
    assert all(mx.array_equal(loaded[name], array) for name, array in state.items())


def test_lazy_arrays_are_in_memory_one_at_a_time(tmp_path):
    """This holds for three shards together."""
    size = 4 << 20
    state = {f"layer.{i}": mx.arange(size // 4).astype(mx.float32) + i for i in range(12)}
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    files = save_safetensors(state, tmp_path, 4 * size)
    assert not state and mx.get_peak_memory() - before < 4 * size
    loaded = load_files([str(tmp_path / file) for file in files if file.endswith(".safetensors")])
    assert len(files) == 4 and all(loaded[f"layer.{i}"][5].item() == 5 + i for i in range(12))


@needs_cpu  # only CPUs have float64
def test_dtype_that_is_not_read(tmp_path):
    with pytest.raises(ValueError, match="'x' has dtype mlx.core.float64, .* Cast it first"):
        save_safetensors({"x": mx.array([1.0], mx.float64)}, tmp_path, "1GB")
    assert not content(tmp_path)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_stale_shards(variant, tmp_path):
    own = {f"model{s}.safetensors" for s in ("", "-00001-of-00002", "-00002-of-00002")} | {
        "model.safetensors.index.json"
    }
    of_variant = {f"model.fp16{s}.safetensors" for s in ("", "-00001-of-00002")} | {"model.safetensors.index.fp16.json"}
    others = {"pytorch_model.bin", "config.json", "model.safetensors.bak", "my-model.safetensors", "modelXsafetensors"}
    for name in own | of_variant | others:
        (tmp_path / name).touch()
    kept = "model-00001-of-00002.safetensors" if variant is None else "model.fp16.safetensors"
    with replace_files(tmp_path, stale_weights(variant)) as folder:
        (folder / kept).touch()
    assert content(tmp_path).keys() == others | {kept} | (own if variant else of_variant)
