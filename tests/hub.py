"""A Hub on this machine: a server that answers huggingface_hub's real client from folders."""

import json
import os
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


class Hub:
    """`repos` is {(repo id, revision): folder}; `requests` are [(method, path, token)] so far.

    A repo in `private` is there for its token alone.
    """

    def __init__(self, repos, private=None):
        self.repos = repos
        self.private = private or {}
        self.requests = []

    def commit(self, repo_id, revision):
        return sha1(f"{repo_id}@{revision}".encode()).hexdigest()

    def find(self, repo_id, revision):
        """(commit, folder) of a revision, which may be given as its commit."""
        for (repo, name), folder in self.repos.items():
            if repo == repo_id and revision in (name, self.commit(repo, name)):
                return self.commit(repo, name), Path(folder)
        return None

    def answer(self, path, token):
        """(status, headers, body)"""
        parts = path.strip("/").split("/")
        if api := parts[:2] == ["api", "models"]:
            parts = parts[2:]
        repo_id = "/".join(parts[:2])
        question, revision, *rest = parts[2:] or ["revision", "main"]
        known = any(repo == repo_id for repo, _ in self.repos)
        if not known or self.private.get(repo_id, token) != token:
            return 401 if known else 404, {"X-Error-Code": "RepoNotFound"}, b""
        found = self.find(repo_id, revision)
        if found is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit, folder = found
        if api:
            info = {"id": repo_id, "sha": commit}
            if question == "tree":
                files = {
                    str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()
                }
                info = [
                    {"type": "file", "path": name, "size": len(x), "oid": sha1(x).hexdigest()}
                    for name, x in files.items()
                ]
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        file = folder.joinpath(*rest)
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        body = file.read_bytes()
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{sha1(body).hexdigest()}"'}, body


@contextmanager
def serve(hub):
    """The URL under which `hub` answers, until the block ends; then no one listens there."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            hub.requests.append((self.command, path, token))
            status, headers, body = hub.answer(path, token)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def environment(endpoint, home, **variables):
    """Of a process whose Hub is at `endpoint` and whose cache is in `home`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return clean | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"} | variables


def use(monkeypatch, endpoint):
    """Let this process talk to the Hub at `endpoint`."""
    from huggingface_hub import constants
    from transformers.utils import hub

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_hf_api", None)
