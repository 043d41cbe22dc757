"""A local Hub to download from."""

import pytest

from tests import hub
from tests.checkpoint.cache import ID
from tests.checkpoints import FORMATS, torch_model


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub with a repository that has each format in a revision of its own, and a private repository."""
    folders = {}
    for value, name in enumerate(FORMATS):
        model = torch_model()
        model.lm_head.bias.data.fill_(value)
        FORMATS[name](model, tmp_path / name)
        folders[ID, name] = tmp_path / name
    folders["someone/secret", "main"] = folders[ID, "main"] = tmp_path / "save"
    server = hub.Hub(folders, private={"someone/secret": "hf_secret"})
    with hub.serve(server) as url:
        hub.use(monkeypatch, url)
        yield server


@pytest.fixture
def patient(monkeypatch):
    """Make huggingface_hub retry without waiting."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
