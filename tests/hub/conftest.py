"""Checkpoints to publish, and a local Hub to publish them on."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mlx_esm_hf import MLXEsmForMaskedLM
from tests.hub import Hub, serve, use
from tests.hub.publishing import TOKEN
from tests.jobs.models import write_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint in one file, with its tokenizer."""
    return write_model(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, made):
    """The same checkpoint in shards."""
    folder = tmp_path_factory.mktemp("sharded")
    MLXEsmForMaskedLM.from_pretrained(made).save_pretrained(folder, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(made).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "checkpoint"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub that this process uses, retrying without waiting."""
    hub = Hub(users={TOKEN: "me", "hf_you": "you"})
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve(hub) as endpoint:
        use(monkeypatch, endpoint)
        hub.endpoint = endpoint
        yield hub
