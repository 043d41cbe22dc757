"""Helpers of tests that download into a cache."""

import socket
from pathlib import Path

import mlx_esm_hf
from tests.hub.repository import etag

ROOT = Path(mlx_esm_hf.__file__).parents[1]


ID = "someone/tiny-esm"


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def names(paths):
    return [Path(path).name for path in paths]


def downloads(server):
    """Return the names of the files that were sent so far."""
    places = ("/resolve/", "/cdn/")
    sent = [path for method, path, _ in server.requests if method == "GET" and any(place in path for place in places)]
    return [path.rpartition("/")[2] for path in sent]


def assert_whole(cache):
    """Check that the content of every file in the cache has the checksum in its name."""
    for file in Path(cache).glob("models--*/blobs/*"):
        assert file.name == etag("x.bin" if len(file.name) == 64 else "x.json", file.read_bytes())
