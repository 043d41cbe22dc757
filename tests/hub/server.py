"""The HTTP server of the local Hub, for huggingface_hub 1 and 2 without Xet."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from tests.hub.repository import GITATTRIBUTES, Repository, etag, git_name, is_large, read_folder

LFS = "application/vnd.git-lfs+json"
METADATA = re.compile(r"---\n(.*?)\n---", re.DOTALL)


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    host: str

    @property
    def parts(self) -> list[str]:
        """The parts of the path. A revision such as `refs%2Fpr%2F1` is one part."""
        return [unquote(part) for part in self.path.strip("/").split("/")]

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    """The error response to a request."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        body = json.dumps({"error": message}).encode()
        self.answer = Answer(status, body, {"X-Error-Message": message} | headers)
        if code:
            self.answer.headers["X-Error-Code"] = code


@dataclass
class Fault:
    """A failure of the next `times` requests whose "METHOD /path" matches.

    Its kind is an HTTP status, "cut" (the connection ends in the middle of the body) or "corrupt" (a byte of the body
    is changed).
    """

    request: str
    kind: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """A local Hub.

    Args:
        repos: {(repo id, revision): folder}
        private: {repo id: the one token that may read it}
        gated: {repo id: the one token that was let in}
        users: {token: name} of those who may create repositories under their name, and write to them.

    Attributes:
        requests: [(method, path, token)] so far.
        sent: bytes of the large files that were uploaded.
        part_size: larger ones are uploaded in parts.
    """

    def __init__(
        self,
        repos: dict[tuple[str, str], str | Path] | None = None,
        private: dict[str, str] | None = None,
        gated: dict[str, str] | None = None,
        users: dict[str, str] | None = None,
    ):
        self.users = {"hf_me": "me"} if users is None else users
        self.repos: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.faults: list[Fault] = []
        self.sent: dict[str, int] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.part_size = 1 << 30
        self.lock = Lock()
        for (repo_id, revision), folder in (repos or {}).items():
            self.push(repo_id, folder, revision)
        for repo_id, token in (private or {}).items():
            self.repos[repo_id].token = token
        for repo_id, token in (gated or {}).items():
            self.repos[repo_id].token, self.repos[repo_id].gated = token, True

    def push(self, repo_id: str, folder: str | Path, revision: str = "main") -> str:
        """Commit the files of a folder as a revision. Return the commit."""
        return self.repos.setdefault(repo_id, Repository()).commit(read_folder(folder), "Push", revision)

    def commit(self, repo_id: str, revision: str) -> str:
        """Return the commit id of a revision."""
        return self.repos[repo_id].refs[revision]

    def fail(self, request: str, kind: int | str, times: int = 1, **headers: str) -> None:
        self.faults.append(Fault(request, kind, times, {name.replace("_", "-"): x for name, x in headers.items()}))

    def fault(self, method: str, path: str) -> Fault | None:
        """Return the first fault that matches this request, and count it as used."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.request, f"{method} {path}"):
                    fault.times -= 1
                    return fault
        return None

    # Permissions

    def known(self, token: str | None) -> bool:
        return token in self.users or any(token == repo.token for repo in self.repos.values() if repo.token)

    def readable(self, repo_id: str, token: str | None) -> Repository:
        if token is not None and not self.known(token):
            raise Refused(401, "Invalid credentials in Authorization header")
        repo = self.repos.get(repo_id)
        hidden = repo is not None and repo.token is not None and not repo.gated and repo.token != token
        if repo is None or (hidden and self.users.get(token or "") != repo_id.partition("/")[0]):
            raise Refused(401 if token is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, repo_id: str, token: str | None) -> Repository:
        repo = self.readable(repo_id, token)
        if token is None:
            raise Refused(401, "Invalid username or password.")
        if self.users.get(token) != repo_id.partition("/")[0]:
            raise Refused(403, "Forbidden: you do not have write access")
        return repo

    def at(self, repo: Repository, revision: str) -> str:
        """Return the commit of a revision, or raise a 404."""
        commit = repo.find(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Reading

    def answer(self, request: Request) -> Answer:
        try:
            return self.route(request)
        except Refused as refused:
            return refused.answer

    def route(self, request: Request) -> Answer:
        match request.method, request.parts:
            case "GET" | "HEAD", ["cdn", oid, _]:
                return self.download(request, oid)
            case "PUT", ["cdn", oid, number]:
                return self.upload(request, oid, int(number))
            case "GET", ["api", "whoami-v2"]:
                return self.whoami(request)
            case "POST", ["oauth", "device"]:
                return self.offer_login(request)
            case "POST", ["oauth", "token"]:
                return as_json({"access_token": next(iter(self.users)), "token_type": "bearer"})
            case "POST", ["api", "repos", "create"]:
                return self.create(request)
            case "POST", ["api", "validate-yaml"]:
                return self.validate(request)
            case "POST", [owner, name, "info", "lfs", "objects", "batch"]:
                return self.batch(request, f"{owner}/{name.removesuffix('.git')}")
            case "POST", ["lfs", "complete", oid]:
                return self.complete(request, oid)
            case "POST", ["lfs", "verify", owner, name]:
                return self.verify(request, f"{owner}/{name}")
            case "GET" | "HEAD", ["api", "models", owner, name, *rest]:
                return self.ask(request, f"{owner}/{name}", rest)
            case "POST", ["api", "models", owner, name, *rest]:
                return self.change(request, f"{owner}/{name}", rest)
            case "GET" | "HEAD", [owner, name, "resolve", revision, *path]:
                return self.resolve(request, f"{owner}/{name}", revision, "/".join(path))
        raise Refused(404, f"Not found: {request.method} {request.path}")

    def ask(self, request: Request, repo_id: str, rest: list[str]) -> Answer:
        repo = self.readable(repo_id, request.token)
        match rest:
            case [] | ["revision", _]:
                commit = self.at(repo, rest[1] if rest else "main")
                files = repo.commits[commit].files
                info = {"id": repo_id, "sha": commit, "private": repo.private, "cardData": card_data(files)}
                return as_json(info | {"siblings": [{"rfilename": path} for path in files]})
            case ["tree", revision, *folder]:
                return as_json(self.tree(request, repo, self.at(repo, revision), "/".join(folder)))
            case ["refs"]:
                pairs = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": c} for name, c in repo.refs.items()
                ]
                return as_json({"branches": pairs, "converts": [], "tags": []})
        raise Refused(404, f"Not found: {request.path}")

    def tree(self, request: Request, repo: Repository, commit: str, folder: str) -> list[dict[str, Any]]:
        """Return the files of a folder, and its folders unless the listing is recursive."""
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, body in repo.commits[commit].files.items():
            if not path.startswith(prefix):
                continue
            child, *below = path.removeprefix(prefix).split("/")
            if below and request.query.get("recursive", ["false"])[0].lower() != "true":
                entries[child] = {"type": "directory", "path": prefix + child, "oid": "0" * 40, "size": 0}
            else:
                entries[path] = describe(path, body)
        if folder and not entries:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        return list(entries.values())

    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Answer:
        """Return a file, or redirect to a large file."""
        repo = self.readable(repo_id, request.token)
        if repo.gated and request.token != repo.token:
            message = f"Access to model {repo_id} is restricted. You must be authenticated to access it."
            raise Refused(401 if request.token is None else 403, message, "GatedRepo")
        commit = self.at(repo, revision)
        files = repo.commits[commit].files
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        body, name = files[path], etag(path, files[path])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{name}"'}
        if not is_large(path):
            return Answer(200, body, headers)
        place = f"http://localhost:{request.host.partition(':')[2]}/cdn/{name}/{quote(path.rpartition('/')[2])}"
        headers |= {"X-Linked-Etag": f'"{name}"', "X-Linked-Size": str(len(body)), "Location": place}
        return Answer(302, b"", headers)

    def download(self, request: Request, oid: str) -> Answer:
        """Return a large file or the rest of it. This is another host than the Hub and must not receive a token."""
        if request.token is not None:
            raise Refused(400, "Only one auth mechanism allowed")
        body = next((repo.objects[oid] for repo in self.repos.values() if oid in repo.objects), None)
        if body is None:
            raise Refused(404, "No such object")
        headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if "Range" not in request.headers:
            return Answer(200, body, headers)
        start = int(request.headers["Range"].removeprefix("bytes=").partition("-")[0])
        if start >= len(body):
            raise Refused(416, "Requested range not satisfiable", **{"Content-Range": f"bytes */{len(body)}"})
        return Answer(206, body[start:], headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"})

    def whoami(self, request: Request) -> Answer:
        if request.token not in self.users:
            raise Refused(401, "Invalid username or password.")
        return as_json({"type": "user", "name": self.users[request.token], "orgs": [], "auth": {}})

    def offer_login(self, request: Request) -> Answer:
        """Return the login page of `hf auth login`. The first user agrees at once."""
        page = f"http://{request.host}/oauth/device"
        return as_json({"device_code": "x", "user_code": "MQIF-VKTL", "verification_uri": page, "interval": 0})

    # Writing

    def create(self, request: Request) -> Answer:
        if request.token not in self.users:
            raise Refused(401, "Invalid username or password.")
        wanted, user = request.json(), self.users[request.token]
        owner = wanted.get("organization") or user
        repo_id = f"{owner}/{wanted['name']}"
        url = f"http://{request.host}/{repo_id}"
        if repo_id in self.repos and owner == user:
            return as_json({"error": "You already created this model repo", "url": url}, status=409)
        if owner != user:
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        private = wanted.get("visibility") == "private"
        repo = self.repos[repo_id] = Repository(token=request.token if private else None, private=private)
        repo.commit({".gitattributes": GITATTRIBUTES}, "initial commit")
        return as_json({"url": url, "name": repo_id, "id": repo_id})

    def validate(self, request: Request) -> Answer:
        """Validate the metadata of a card. The real Hub checks more."""
        match = METADATA.match(request.json()["content"])
        if match is None:
            return as_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            data = yaml.safe_load(match.group(1))
        except yaml.YAMLError as error:
            return as_json({"error": "x", "errors": [{"message": str(error)}], "warnings": []}, status=400)
        errors = [
            {"message": f'"{key}" must be a string'} for key in ("license",) if not isinstance(data.get(key, ""), str)
        ]
        return as_json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def change(self, request: Request, repo_id: str, rest: list[str]) -> Answer:
        pull_request = request.query.get("create_pr") == ["1"]
        if pull_request or rest[0] == "paths-info":
            repo = self.readable(repo_id, request.token)
        else:
            repo = self.writable(repo_id, request.token)
        match rest:
            case ["preupload", revision]:
                files = repo.commits[self.at(repo, revision)].files
                return as_json({"files": [self.preupload(files, wanted["path"]) for wanted in request.json()["files"]]})
            case ["commit", revision]:
                return self.take_commit(request, repo_id, repo, revision, pull_request)
            case ["branch", branch]:
                if branch in repo.refs:
                    raise Refused(409, f'Reference "refs/heads/{branch}" already exists')
                repo.refs[branch] = self.at(repo, request.json().get("startingPoint") or "main")
                return as_json({})
            case ["paths-info", revision]:
                files = repo.commits[self.at(repo, revision)].files
                wanted = parse_qs(request.body.decode()).get("paths", [])
                return as_json([describe(path, files[path]) for path in wanted if path in files])
        raise Refused(404, f"Not found: {request.path}")

    def preupload(self, files: dict[str, bytes], path: str) -> dict[str, Any]:
        mode = "lfs" if is_large(path) else "regular"
        oid = {"oid": etag(path, files[path])} if path in files else {}
        return {"path": path, "uploadMode": mode, "shouldIgnore": False} | oid

    def batch(self, request: Request, repo_id: str) -> Answer:
        """Return upload URLs for large files that are not here yet."""
        if "ref" in request.json():
            repo = self.writable(repo_id, request.token)
        else:  # for a pull request
            repo = self.readable(repo_id, request.token)
        wanted, answers = request.json()["objects"], []
        for large in wanted:
            oid, size = large["oid"], large["size"]
            if oid in repo.objects:
                answers.append(large)
                continue
            place = f"http://{request.host}"
            upload: dict[str, Any] = {"href": f"{place}/cdn/{oid}/1"}
            if size > self.part_size:
                parts = {str(n + 1): f"{place}/cdn/{oid}/{n + 1}" for n in range(math.ceil(size / self.part_size))}
                upload = {"href": f"{place}/lfs/complete/{oid}", "header": {"chunk_size": str(self.part_size)} | parts}
            verify = {"href": f"{place}/lfs/verify/{repo_id}"}
            answers.append(large | {"actions": {"upload": upload, "verify": verify}})
        return as_json({"transfer": "basic", "objects": answers}, kind=LFS)

    def upload(self, request: Request, oid: str, number: int) -> Answer:
        with self.lock:
            self.parts.setdefault(oid, {})[number] = request.body
            self.sent[oid] = self.sent.get(oid, 0) + len(request.body)
        return Answer(200, b"", {"ETag": f'"{git_name(request.body)}"'})

    def complete(self, request: Request, oid: str) -> Answer:
        for part in request.json()["parts"]:
            if part["etag"].strip('"') != git_name(self.parts[oid][part["partNumber"]]):
                raise Refused(400, "A part is not the one that was sent")
        return as_json({})

    def verify(self, request: Request, repo_id: str) -> Answer:
        """Accept a large file if it is the one that was announced."""
        oid, size = request.json()["oid"], request.json()["size"]
        repo = self.readable(repo_id, request.token)
        parts = self.parts.pop(oid, {})
        body = b"".join(parts[number] for number in sorted(parts))
        if len(body) != size or sha256(body).hexdigest() != oid:
            raise Refused(400, "The uploaded file is not the one that was announced")
        repo.objects[oid] = body
        return as_json({})

    def take_commit(
        self, request: Request, repo_id: str, repo: Repository, revision: str, pull_request: bool
    ) -> Answer:
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.lock:
            head = self.at(repo, revision)
            if header.get("parentCommit", head) != head:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo.commits[head].files)
            for line in lines:
                self.apply(files, repo, line["key"], line["value"])
            ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.refs)}" if pull_request else revision
            commit = repo.commit(files, header["summary"], ref, header.get("description", ""))
        result = {
            "commitUrl": f"http://{request.host}/{repo_id}/commit/{commit}",
            "commitOid": commit,
            "hookOutput": "",
        }
        if pull_request:
            result["pullRequestUrl"] = f"http://{request.host}/{repo_id}/discussions/{ref.rpartition('/')[2]}"
        return as_json(result)

    def apply(self, files: dict[str, bytes], repo: Repository, key: str, value: dict[str, Any]) -> None:
        """Apply one line of a commit."""
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise Refused(400, f"LFS pointer of {value['path']} points to a file that does not exist")
            files[value["path"]] = repo.objects[value["oid"]]
        elif key == "deletedFile":
            if value["path"] not in files:
                raise Refused(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            del files[value["path"]]
        elif key != "header":
            raise Refused(400, f"{key} is not known here")


def as_json(content: Any, status: int = 200, kind: str = "application/json") -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": kind})


def describe(path: str, body: bytes) -> dict[str, Any]:
    """Return an entry of a listing."""
    entry = {"type": "file", "path": path, "size": len(body), "oid": git_name(body)}
    if is_large(path):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{etag(path, body)}\nsize {len(body)}\n"
        entry["oid"] = git_name(pointer.encode())
        entry["lfs"] = {"oid": etag(path, body), "size": len(body), "pointerSize": len(pointer)}
    return entry


def card_data(files: dict[str, bytes]) -> Any:
    """Return the metadata in the card of a repository."""
    match = METADATA.match(files.get("README.md", b"").decode())
    return yaml.safe_load(match.group(1)) if match else None


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Yield the URL of `hub`, which is served until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            fault = hub.fault(self.command, parts.path)
            kind = fault.kind if fault else None
            body = self.read_body(cut=kind == "cut")
            if kind == "corrupt" and body:
                body = corrupted(body)
            host = self.headers.get("Host", "")
            request = Request(self.command, parts.path, parse_qs(parts.query), self.headers, body, host)
            hub.requests.append((self.command, parts.path, request.token))
            if self.command in ("PUT", "POST") and kind == "cut":
                self.close_connection = True
                return  # without a response
            if isinstance(kind, int):
                answer = Refused(kind, f"Trouble {kind}", **fault.headers).answer
            else:
                answer = hub.answer(request)
            if self.command == "GET" and kind == "corrupt":
                answer.body = corrupted(answer.body)
            self.reply(answer, cut=kind == "cut")

        do_HEAD = do_PUT = do_POST = do_GET

        def read_body(self, cut: bool) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                    if cut:
                        return body
                self.rfile.readline()
                return body
            size = int(self.headers.get("Content-Length", 0))
            return self.rfile.read(size // 2 if cut else size)

        def reply(self, answer: Answer, cut: bool) -> None:
            self.send_response(answer.status)
            for name, value in (answer.headers | {"Content-Length": str(len(answer.body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body[: len(answer.body) // 2] if cut else answer.body)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def corrupted(body: bytes) -> bytes:
    """Return the same bytes with one in the middle changed."""
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :]
