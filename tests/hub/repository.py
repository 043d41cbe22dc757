"""A repository of the Hub: commits, refs and large files."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha1, sha256
from pathlib import Path

LARGE = (".safetensors", ".bin", ".h5", ".npz")  # stored in LFS by the .gitattributes of the Hub
GITATTRIBUTES = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE).encode()


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def etag(path: str, body: bytes) -> str:
    """Return the Hub's name for the content of a file: its SHA-256 in LFS, otherwise git's hash of a blob."""
    return sha256(body).hexdigest() if is_large(path) else git_name(body)


def git_name(body: bytes) -> str:
    return sha1(b"blob %d\0" % len(body) + body).hexdigest()


def read_folder(folder: str | Path) -> dict[str, bytes]:
    """Return {path: content} of a folder."""
    folder = Path(folder)
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@dataclass
class Commit:
    files: dict[str, bytes]
    message: str
    description: str = ""


@dataclass
class Repository:
    """A repository.

    Attributes:
        token: the only token that may read it; None if everyone may.
        gated: whether it is gated.
        commits: {id: commit}
        refs: {name of a branch, tag or pull request: id of a commit}
        objects: {SHA-256: content} of uploaded large files, committed or not.
    """

    token: str | None = None
    gated: bool = False
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], message: str, ref: str = "main", description: str = "") -> str:
        """Add a commit, make `ref` point to it, and return its id."""
        listing = "".join(f"{git_name(files[path])} {path}\n" for path in sorted(files))
        commit = sha1(f"{len(self.commits)} {self.refs.get(ref)} {message}\n{listing}".encode()).hexdigest()
        self.commits[commit] = Commit(dict(files), message, description)
        self.objects |= {etag(path, body): body for path, body in files.items() if is_large(path)}
        self.refs[ref] = commit
        return commit

    def find(self, revision: str) -> str | None:
        """Return the commit of a branch, tag, pull request or commit id."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return {path: content} of a revision."""
        return self.commits[self.refs.get(revision, revision)].files
