"""A local Hub that serves the real client huggingface_hub, and fails when a test asks for it."""

import os

from tests.hub.repository import Repository
from tests.hub.server import Hub, Request, serve

__all__ = ["Hub", "Repository", "Request", "environment", "serve", "use"]


def environment(endpoint, home, **variables):
    """Return the environment of a process with the Hub at `endpoint` and its cache in `home`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    ours = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    return clean | ours | variables


def use(monkeypatch, endpoint):
    """Make this process use the Hub at `endpoint`."""
    from huggingface_hub import constants
    from transformers.utils import hub

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub, "_hf_api", None)
