"""A repository of the Hub: commits, refs, and the large files beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha1, sha256
from pathlib import Path

LARGE = (".safetensors", ".bin", ".h5", ".npz")  # what the Hub's .gitattributes sends to LFS
GITATTRIBUTES = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE).encode()


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def etag(path: str, body: bytes) -> str:
    """What the Hub calls a file's content by: its sha256 in LFS, else git's own name for a blob."""
    return sha256(body).hexdigest() if is_large(path) else git_name(body)


def git_name(body: bytes) -> str:
    return sha1(b"blob %d\0" % len(body) + body).hexdigest()


def read_folder(folder: str | Path) -> dict[str, bytes]:
    """{path: content}"""
    folder = Path(folder)
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@dataclass
class Commit:
    files: dict[str, bytes]
    message: str
    description: str = ""


@dataclass
class Repository:
    """
    Attributes:
        token: who may read it, if not everyone may.
        gated: whether its existence is told to others.
        commits: {id: commit}
        refs: {name of a branch, tag or pull request: id of a commit}
        objects: {sha256: content} of the large files that were uploaded, committed or not.
    """

    token: str | None = None
    gated: bool = False
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], message: str, ref: str = "main", description: str = "") -> str:
        """The id of a new commit, to which `ref` points from now on."""
        listing = "".join(f"{git_name(files[path])} {path}\n" for path in sorted(files))
        commit = sha1(f"{len(self.commits)} {self.refs.get(ref)} {message}\n{listing}".encode()).hexdigest()
        self.commits[commit] = Commit(dict(files), message, description)
        self.objects |= {etag(path, body): body for path, body in files.items() if is_large(path)}
        self.refs[ref] = commit
        return commit

    def find(self, revision: str) -> str | None:
        """The commit of a branch, a tag, a pull request, or a commit's own id."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """What a visitor sees."""
        return self.commits[self.refs.get(revision, revision)].files
