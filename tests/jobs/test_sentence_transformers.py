"""Embeddings of repositories made for sentence-transformers, compared with its definition in torch."""

import json
import logging
import re

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, EsmModel

from mlx_esm_hf import embed, load_protein_model
from mlx_esm_hf.models.auto import MLXAutoModel
from tests.hub import Hub, serve, use
from tests.wild import write_wild

PROTEINS = ["MKTAYIAKQRQISFVKSHFSR", "MKX"]
TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
MEAN = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
MAX = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}
CLS = {"embedding_dimension": 32, "pooling_mode": "cls"}  # as later versions write it


def write(folder, pooling, *others):
    write_wild(folder, "oriel9p/protsent-esm2")
    (folder / "modules.json").write_text(json.dumps([TRANSFORMER, POOLING, *others]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return str(folder)


def pooled_by_torch(folder, kind):
    """Return the vectors of sentence-transformers' pooling: over all tokens but padding."""
    batch = AutoTokenizer.from_pretrained(folder)(PROTEINS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = EsmModel.from_pretrained(folder)(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    if kind == "mean_tokens":
        return ((states * mask).sum(1) / mask.sum(1)).numpy()
    if kind == "max_tokens":
        return states.masked_fill(mask == 0, -np.inf).amax(1).numpy()
    return states[:, 0].numpy()


@pytest.mark.parametrize(("config", "kind"), [(MEAN, "mean_tokens"), (MAX, "max_tokens"), (CLS, "cls")])
def test_pooling_is_reported_and_available(tmp_path, caplog, config, kind):
    folder = write(tmp_path, config)
    with caplog.at_level(logging.WARNING):
        list(embed(PROTEINS, folder))
    (notice,) = [record.getMessage() for record in caplog.records if "sentence-transformers" in record.getMessage()]
    assert f"--pooling {kind}" in notice and tmp_path.name in notice
    caplog.clear()
    found = np.stack([result.arrays[kind] for result in embed(PROTEINS, folder, pooling=["mean", kind])])
    assert "sentence-transformers" not in caplog.text  # the vector was asked for
    np.testing.assert_allclose(found, pooled_by_torch(folder, kind), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "others", "message"),
    [
        (MEAN, [NORMALIZE], "--pooling mean_tokens.* then applies Normalize"),
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            [],
            "cls and mean, which is not available",
        ),
        ({"pooling_mode_lasttoken": True}, [], "lasttoken, which is not available"),
        ({}, [], "does not say which pooling"),
    ],
)
def test_other_modules_are_reported(tmp_path, caplog, config, others, message):
    list(embed(PROTEINS, write(tmp_path, config, *others)))
    assert re.search(message, caplog.text)


def test_several_windows(tmp_path):
    """The states of <cls> and <eos> are means over the windows, as that of <cls> is."""
    write_wild(tmp_path, "isikz/esm1b")
    model = load_protein_model(MLXAutoModel, str(tmp_path), long="window")
    protein = "MKTAYIAKQRQISFVK" * 100
    (result,) = embed([protein], model, pooling=["mean_tokens", "max_tokens", "mean", "max"])
    mean, several = result.arrays["mean"], result.arrays["mean_tokens"]
    assert 0 < np.abs(mean - several).max() < 0.05 and (result.arrays["max_tokens"] >= result.arrays["max"]).all()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local Hub without repositories, and an empty cache."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub = Hub()
    with serve(hub) as endpoint:
        use(monkeypatch, endpoint)
        yield hub


def test_on_the_hub(hub, tmp_path, caplog):
    """The report needs the Hub. If it does not answer, the cached model still embeds."""
    (tmp_path / "repository").mkdir()
    write(tmp_path / "repository", MEAN)
    hub.push("me/sentences", tmp_path / "repository")
    (expected,) = embed(PROTEINS[:1], "me/sentences")
    assert "me/sentences was made for sentence-transformers" in caplog.text
    for link in (tmp_path / "cache").rglob("modules.json"):
        link.unlink()
    hub.fail("GET /me/sentences/resolve/.*modules.json", 500, 99)
    hub.fail("HEAD /me/sentences/resolve/.*modules.json", 500, 99)
    (found,) = embed(PROTEINS[:1], "me/sentences")
    np.testing.assert_array_equal(found.arrays["mean"], expected.arrays["mean"])
