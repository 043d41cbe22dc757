"""Errors of the Hub while files are downloaded."""

import pytest

import mlx_esm_hf
from mlx_esm_hf import MLXEsmForMaskedLM
from mlx_esm_hf.checkpoint.resolve import checkpoint_files
from tests.checkpoint.cache import ID, assert_whole, downloads
from tests.checkpoints import FORMATS

TROUBLE = [
    ("HEAD .*model", 401, "the token is missing or not valid: log in"),
    ("HEAD .*model", 403, "answered 403 .*the token does not allow this"),
    ("HEAD .*model", 429, "answered 429 .*too many requests: wait a few minutes"),
    ("HEAD .*model", 500, "answered 500 .*the server has a problem: try again later"),
    ("GET /cdn/", 403, "answered 403"),
    ("GET /cdn/", 404, "answered 404"),
    ("GET /cdn/", 416, "answered 416 .*try again; the download starts over"),
    ("GET /cdn/", 429, "answered 429 .*too many requests"),
    ("GET /cdn/", 500, "answered 500 .*try again later"),
    ("GET /cdn/", "cut", None),
    (
        "GET /cdn/",
        "corrupt",
        "was damaged in the download: its checksum is not [0-9a-f]{64}. It was removed from the cache",
    ),
]


@pytest.mark.parametrize("format", ["save", "save_shards", "save_bin"])
@pytest.mark.parametrize(("request_", "kind", "message"), TROUBLE)
def test_errors(format, request_, kind, message, server, patient, tmp_path):
    """The message is one sentence, the cache stays intact, and loading works once the Hub works again.

    A download that was cut resumes where it ended.
    """
    options = {"revision": format, "cache_dir": tmp_path / "cache"}
    server.fail(request_, kind, 1 if kind == "cut" else 99)
    if message is None:
        MLXEsmForMaskedLM.from_pretrained(ID, **options)
        return
    with pytest.raises(OSError, match=f"(?s){message}") as error:
        MLXEsmForMaskedLM.from_pretrained(ID, **options)
    assert "\n" not in str(error.value)
    assert_whole(tmp_path / "cache")
    server.faults.clear()
    model = MLXEsmForMaskedLM.from_pretrained(ID, **options)
    assert (model.lm_head.bias == list(FORMATS).index(format)).all()


def test_cut_download_resumes_where_it_ended(server, patient, tmp_path, monkeypatch):
    """The download resumes at the start of the chunk that was cut off: 10 MB, here 1000 bytes."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    whole = (tmp_path / "save" / "model.safetensors").stat().st_size
    asked = []
    answer = server.answer

    def remember(request):
        if request.method == "GET" and "/cdn/" in request.path:
            asked.append(request.headers.get("Range"))
        return answer(request)

    server.answer = remember
    server.fail("GET /cdn/", "cut", 2)
    MLXEsmForMaskedLM.from_pretrained(ID, cache_dir=tmp_path / "cache")
    first = whole // 2 // 1000 * 1000
    second = first + (whole - first) // 2 // 1000 * 1000
    assert asked == [None, f"bytes={first}-", f"bytes={second}-"]


def test_connection_that_stays_cut(server, patient, tmp_path):
    server.fail("GET /cdn/", "cut", 999)
    with pytest.raises(OSError, match="the connection to .* failed .*Try again: complete files are kept"):
        MLXEsmForMaskedLM.from_pretrained(ID, cache_dir=tmp_path / "cache")
    assert_whole(tmp_path / "cache")
    server.faults.clear()
    MLXEsmForMaskedLM.from_pretrained(ID, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("model_class", [MLXEsmForMaskedLM, mlx_esm_hf.MLXAutoModelForMaskedLM])
@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        ("GET .*config.json", "corrupt", "config.json was damaged in the download: its checksum is not [0-9a-f]{40}"),
        ("HEAD .*config.json", 403, "answered 403 .*the token does not allow this"),
        ("HEAD .*config.json", 429, "answered 429 .*too many requests: wait a few minutes"),
        ("GET .*config.json", 500, "answered 500 .*try again later"),
        ("GET .*config.json", "cut", "the connection to .* failed .*Try again"),
    ],
)
def test_errors_with_the_config(model_class, request_, kind, message, server, patient, tmp_path):
    server.fail(request_, kind, 99)
    with pytest.raises(OSError, match=message) as error:
        model_class.from_pretrained(ID, cache_dir=tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert_whole(tmp_path / "cache")
    server.faults.clear()
    model_class.from_pretrained(ID, cache_dir=tmp_path / "cache")


def test_damaged_shard(server, patient, tmp_path):
    """Only the damaged shard is removed and downloaded again. The same holds for a damaged index."""
    options = {"revision": "save_shards", "cache_dir": tmp_path / "cache"}
    server.fail("GET /cdn/.*/model-00002", "corrupt")
    with pytest.raises(OSError, match="model-00002.* was damaged in the download"):
        MLXEsmForMaskedLM.from_pretrained(ID, **options)
    del server.requests[:]
    MLXEsmForMaskedLM.from_pretrained(ID, **options)
    assert [name[:11] for name in downloads(server)] == ["model-00002"]
    options["cache_dir"] = tmp_path / "other"
    server.fail("GET .*index.json", "corrupt")
    with pytest.raises(OSError, match="index.json was damaged in the download: its checksum is not [0-9a-f]{40}"):
        MLXEsmForMaskedLM.from_pretrained(ID, **options)
    MLXEsmForMaskedLM.from_pretrained(ID, **options)


def test_errors_with_the_weights_in_the_cache(server, patient, tmp_path):
    """Files in the cache are used whatever the Hub responds."""
    options = {"cache_dir": tmp_path / "cache"}
    MLXEsmForMaskedLM.from_pretrained(ID, **options)
    for kind in (500, 429):
        server.fail(".*", kind, 999)
        MLXEsmForMaskedLM.from_pretrained(ID, **options)
        server.faults.clear()


def test_gated(server, patient, tmp_path):
    server.push("someone/gated", tmp_path / "save")
    server.repos["someone/gated"].token, server.repos["someone/gated"].gated = "hf_in", True
    options = {"cache_dir": tmp_path / "cache"}
    for token in (False, "hf_me"):
        with pytest.raises(OSError, match="someone/gated is gated: ask for access at .*/someone/gated, and log in"):
            MLXEsmForMaskedLM.from_pretrained("someone/gated", token=token, **options)
        with pytest.raises(OSError, match="someone/gated is gated: ask for access at .*/someone/gated, and log in"):
            checkpoint_files("someone/gated", token=token, **options)
    MLXEsmForMaskedLM.from_pretrained("someone/gated", token="hf_in", **options)


def test_weights_of_a_missing_repository(server, tmp_path):
    options = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(OSError, match="has no repository someone/absent, or it is private: log in"):
        checkpoint_files("someone/absent", **options)
    with pytest.raises(OSError, match="has no branch, tag or commit 'v9'"):
        checkpoint_files(ID, revision="v9", **options)
    with pytest.raises(OSError, match="Folder a/b/c not found"):
        checkpoint_files("a/b/c", **options)
