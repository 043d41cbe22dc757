"""Loading a model with its tokenizer, and batching."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_esm_hf import MLXAutoModel, load_protein_model
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.ops import kernels
from tests.hub import Hub, serve, use
from tests.jobs.models import write_model
from tests.marks import needs_cpu, needs_kernels


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "esm2")


def test_model_and_tokenizer_of_one_commit(folder, tmp_path, monkeypatch):
    """What is pushed after the weights were downloaded is not read."""
    later = shutil.copytree(folder, tmp_path / "later")
    (later / "vocab.txt").write_text((folder / "vocab.txt").read_text().replace("L\nA\n", "A\nL\n"))
    hub = Hub({("me/esm", "main"): folder})
    with serve(hub) as endpoint:
        use(monkeypatch, endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        answer = hub.answer

        def push_after_weights(request):
            result = answer(request)
            if request.path.endswith("model.safetensors"):
                hub.push("me/esm", later)
            return result

        hub.answer = push_after_weights
        loaded = load_protein_model(MLXAutoModel, "me/esm")
        assert hub.commit("me/esm", "main") != loaded.revision
    assert loaded.vocabulary.ids == load_protein_model(MLXAutoModel, str(folder)).vocabulary.ids


def no_vocabulary(folder):
    (folder / "vocab.txt").unlink()


def cut_config(folder):
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class":')


def list_for_config(folder):
    (folder / "tokenizer_config.json").write_text("[1]")


def binary_vocabulary(folder):
    (folder / "vocab.txt").write_bytes(bytes(range(128, 256)))


@pytest.mark.parametrize("damage", [no_vocabulary, cut_config, list_for_config, binary_vocabulary])
def test_damaged_tokenizer(damage, folder):
    damage(folder)
    with pytest.raises((CheckpointError, OSError), match="tokenizer"):
        load_protein_model(MLXAutoModel, str(folder))


def test_unknown_device(folder):
    with pytest.raises(ValueError, match="device='tpu' is not one of cpu, gpu"):
        load_protein_model(MLXAutoModel, str(folder), device="tpu")


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="there is a GPU")
def test_missing_gpu(folder):
    with pytest.raises(ValueError, match="device='gpu': MLX has no GPU here"):
        load_protein_model(MLXAutoModel, str(folder), device="gpu")


def rows_of(model, lengths):
    """Return the number of rows of each batch of sequences of these lengths."""
    sequences = [np.full(length, model.vocabulary.ids["A"], np.int32) for length in lengths]
    return [len(batch.windows) for batch in model.batches(sequences)]


def test_rows_are_separated_if_padding_is_computed(folder, monkeypatch):
    monkeypatch.setattr(kernels, "native", None)
    model = load_protein_model(MLXAutoModel, str(folder), batch_tokens=16384)
    assert rows_of(model, [2000, 100, 99, 98]) == [1, 3]


@needs_cpu
@needs_kernels
def test_fewest_batches_if_they_are_packed(folder):
    model = load_protein_model(MLXAutoModel, str(folder), batch_tokens=16384)
    assert rows_of(model, [2000, 100, 99, 98]) == [4]
