"""Checkpoints written by the reference libraries, and comparisons with transformers."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
import transformers
from huggingface_hub import save_torch_state_dict

import mlx_esm_hf
from tests.tiny import tiny

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file

TASKS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
SHARD = "20KB"  # splits the small models into several files

KINDS = {"esm2": "ESM-2", "esm1b": "ESM-1b", "esm1v": "ESM-1v"}

INPUTS = {
    "input_ids": [[0, 20, 15, 32, 6, 7, 11, 4, 2], [0, 20, 9, 8, 5, 2, 1, 1, 1]],
    "attention_mask": [[1] * 9, [1] * 6 + [0] * 3],
}
REAL = np.array(INPUTS["attention_mask"], bool)


def python_of_transformers_4(folder):
    """Return a Python with transformers 4.x: MLX_ESM_TRANSFORMERS4_PYTHON, or a new environment."""
    python = os.environ.get("MLX_ESM_TRANSFORMERS4_PYTHON")
    if python is None:
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        python = folder / "venv" / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.13.0", "transformers<5"], check=True)
    return python


def ours(task):
    return getattr(mlx_esm_hf, f"MLXEsm{task}")


def theirs(task):
    return getattr(transformers, f"Esm{task}")


def config(kind="esm2", **overrides):
    return transformers.EsmConfig(**tiny(KINDS[kind], **{"eos_token_id": 2, "initializer_range": 0.2} | overrides))


def torch_model(task="ForMaskedLM", kind="esm2", **overrides):
    """Return a model of transformers in which every parameter differs from its initial value."""
    torch.manual_seed(0)
    model = theirs(task)(config(kind, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def write(folder, state, kind="esm2", **overrides):
    """Write config and state dict with the safetensors library, and return the folder."""
    folder.mkdir(exist_ok=True)
    config(kind, **overrides).save_pretrained(folder)
    state = {key: tensor.contiguous().clone() for key, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# Functions that write a model of transformers to a folder.


def save(model, folder, variant=None):
    model.save_pretrained(folder, variant=variant)


def save_shards(model, folder, variant=None):
    model.save_pretrained(folder, variant=variant, max_shard_size=SHARD)


def save_bin(model, folder, variant=None, **options):
    model.config.save_pretrained(folder)
    name = f"pytorch_model.{variant}.bin" if variant else "pytorch_model.bin"
    torch.save(model.state_dict(), folder / name, **options)


def save_old_bin(model, folder):
    save_bin(model, folder, _use_new_zipfile_serialization=False)


def save_bin_shards(model, folder):
    model.config.save_pretrained(folder)
    save_torch_state_dict(model.state_dict(), folder, max_shard_size=SHARD, safe_serialization=False)


FORMATS = {f.__name__: f for f in (save, save_shards, save_bin, save_old_bin, save_bin_shards)}


def write_large(folder, format, dtype, **shape):
    """Write an ESM-2 of this shape with random weights; see `write_random`."""
    return write_random(folder, format, dtype, config(**shape), theirs("ForMaskedLM"))


def write_random(folder, format, dtype, config, model_class):
    """Write random weights, one shard per layer and one for the rest, and return their total size in float32."""
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = model_class(config).state_dict()
    if config.tie_word_embeddings:
        del shapes["lm_head.decoder.weight"]
    names = {"safetensors": "model", "bin": "pytorch_model"}
    layers = {key: (re.findall(r"layers?\.([0-9]+)", key) or ["x"])[0] for key in shapes}
    weight_map = {key: f"{names[format]}-{layer}.{format}" for key, layer in layers.items()}
    for shard in set(weight_map.values()):
        keys = [key for key, place in weight_map.items() if place == shard]
        state = {key: 0.02 * torch.randn(shapes[key].shape).to(getattr(torch, dtype)) for key in keys}
        if format == "bin":
            torch.save(state, folder / shard)
        else:
            save_file(state, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{names[format]}.{format}.index.json").write_text(json.dumps(index))
    return sum(4 * x.numel() for x in shapes.values())


# Comparisons


def run(model, **options):
    """Return a model's outputs for `INPUTS` as {name: array}, without padding."""
    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            outputs = model(**{name: torch.tensor(x) for name, x in INPUTS.items()}, **options)
    else:
        outputs = model(**INPUTS, **options)
    arrays = {}
    for name in outputs:
        x = outputs[name]
        x = np.array(x.astype(mx.float32)) if isinstance(x, mx.array) else x.float().numpy()
        arrays[name] = x[REAL] if x.shape[:2] == REAL.shape else x
    return arrays


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert np.abs(ours[name] - x).max() <= tolerance * np.abs(x).max(), name


def assert_same_state(a, b):
    """Assert that two state dicts of torch have the same names and bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def assert_loads_as_transformers(folder, task, **options):
    """Assert that both libraries load the same model from a folder and report the same keys; return our model."""
    options = {"dtype": torch.float32} | options
    torch_model, torch_info = theirs(task).from_pretrained(folder, output_loading_info=True, **options)
    model, info = ours(task).from_pretrained(folder, output_loading_info=True, **options)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert info[kind] == set(torch_info[kind]), kind
    assert not info["error_msgs"] and not torch_info["error_msgs"]
    if info["missing_keys"]:  # a newly initialized head cannot be compared
        model_body, torch_body = model.base_model, torch_model.base_model
        assert_close(
            {"last_hidden_state": run(model_body)["last_hidden_state"]},
            {"last_hidden_state": run(torch_body)["last_hidden_state"]},
        )
    else:
        assert_close(run(model), run(torch_model))
    return model


@contextmanager
def heard(*loggers):
    """Yield a list that collects messages of these loggers from WARNING on, and Python's warnings."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    for name in loggers:
        logging.getLogger(name).addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield messages
    finally:
        for name in loggers:
            logging.getLogger(name).removeHandler(handler)
    messages += [str(w.message) for w in caught]
