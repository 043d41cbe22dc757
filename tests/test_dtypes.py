"""Dtypes of loaded models."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_esm_hf import MLXEsmForMaskedLM, dtypes
from mlx_esm_hf.errors import CheckpointError
from tests.checkpoints import (
    edit_config,
    heard,
    save,
    torch,
    torch_model,
)


@pytest.fixture(autouse=True)
def _reset_warnings():
    """Log warnings that appear once per process once per test."""
    dtypes.warn_once.cache_clear()


@pytest.fixture
def folder(tmp_path):
    """An ESM-2 with its language-model head, saved by transformers 5."""
    save(torch_model(), tmp_path / "esm2")
    return tmp_path / "esm2"


@pytest.mark.parametrize("dtype", ["int8", "float8", torch.int8, mx.int32, 16])
def test_unknown_dtype(dtype, folder):
    with pytest.raises(ValueError, match="dtype must be one of float32, .*'auto'"):
        MLXEsmForMaskedLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["float16", "torch.float16", "half", mx.float16, torch.float16, np.dtype("float16")])
def test_dtype(dtype, argument, folder):
    with heard("mlx_esm_hf") as said:
        model = MLXEsmForMaskedLM.from_pretrained(folder, **{argument: dtype})
    assert model.dtype == mx.float16 and not said
    assert all(x.dtype == mx.float16 for _, x in model.named_parameters())
    assert model.esm.rotary_embeddings.inv_freq.dtype == mx.float32


def test_dtype_overrides_torch_dtype(folder):
    model = MLXEsmForMaskedLM.from_pretrained(folder, dtype="bfloat16", torch_dtype="float16")
    assert model.dtype == mx.bfloat16


@pytest.mark.parametrize("argument", [{}, {"dtype": "auto"}, {"torch_dtype": "auto"}, {"dtype": None}])
@pytest.mark.parametrize(("dtype", "in_config"), [("float16", True), ("float16", False), ("bfloat16", False)])
def test_auto_dtype(dtype, in_config, argument, tmp_path):
    """On a CPU, where half precision is slow, "auto" means float32, with one warning; elsewhere it keeps the dtype."""
    save(torch_model().to(getattr(torch, dtype)), tmp_path)
    if not in_config:
        edit_config(tmp_path, dtype=None)
    with heard("mlx_esm_hf") as said:
        models = [MLXEsmForMaskedLM.from_pretrained(tmp_path, **argument) for _ in range(2)]
    on_cpu = mx.default_device() == mx.cpu
    for model in models:
        assert model.dtype == (mx.float32 if on_cpu else getattr(mx, dtype))
        assert model.config.dtype == ("float32" if on_cpu else dtype)
    assert len(said) == on_cpu and all("loaded as float32" in message for message in said)


def test_integer_weights_are_refused(folder):
    """The bits of float32 labeled as int32 would be finite but wrong."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(CheckpointError, match="has integer dtype"):
        MLXEsmForMaskedLM.from_pretrained(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_integer_weights_in_a_bin_file_are_refused(zipped, folder):
    """Torch stores such a tensor as IntStorage."""
    state = torch_model().state_dict()
    name = "esm.encoder.layer.1.output.dense.weight"
    (folder / "model.safetensors").unlink()
    state[name] = state[name].view(torch.int32)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=f"{name}' has integer dtype"):
        MLXEsmForMaskedLM.from_pretrained(folder)


def test_integer_weights_in_a_state_dict_are_refused(folder):
    model = MLXEsmForMaskedLM.from_pretrained(folder)
    name = "lm_head.dense.weight"
    state = model.state_dict() | {name: model.state_dict()[name].view(mx.int32)}
    with pytest.raises(RuntimeError, match=f"{name!r} has integer dtype"):
        model.load_state_dict(state)
    with pytest.raises(CheckpointError, match=f"{name}' has integer dtype"):
        MLXEsmForMaskedLM.from_pretrained(folder, state_dict=state)
