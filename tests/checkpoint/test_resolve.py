"""Which files are read: from a folder, from the cache that torch users share, and from a Hub on this machine."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mlx_esm_hf
from mlx_esm_hf import MLXEsmForMaskedLM
from mlx_esm_hf.checkpoint.resolve import checkpoint_files, shard_names, with_variant
from mlx_esm_hf.errors import CheckpointError
from tests import hub
from tests.checkpoints import FORMATS, assert_close, run, save_shards, theirs, torch, torch_model
from tests.hub.repository import etag

ROOT = Path(mlx_esm_hf.__file__).parents[1]
ID = "someone/tiny-esm"


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def names(paths):
    return [Path(path).name for path in paths]


# Folders


ORDER = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_order(variant, tmp_path):
    """Safetensors before .bin, whole before shards; use_safetensors leaves one of them out."""
    for name in ORDER:
        text = json.dumps({"metadata": {}, "weight_map": {"b": f"2.{name}", "a": f"1.{name}"}})
        (tmp_path / with_variant(name, variant)).write_text(text)
        for shard in (1, 2):
            (tmp_path / f"{shard}.{name}").touch()
    for name in ORDER:
        found = [f"{shard}.{name}" for shard in (1, 2)] if "index" in name else [with_variant(name, variant)]
        assert names(checkpoint_files(str(tmp_path), variant)) == found
        if name.startswith("model"):
            assert names(checkpoint_files(str(tmp_path), variant, True)) == found
            assert "bin" in names(checkpoint_files(str(tmp_path), variant, False))[0]
        (tmp_path / with_variant(name, variant)).unlink()
    with pytest.raises(OSError, match=f"{tmp_path} holds none of .*pytorch_model.* no weights to load.$"):
        checkpoint_files(str(tmp_path), variant)


def test_variant_names():
    """As transformers names them."""
    from transformers.modeling_utils import _add_variant

    for name in ORDER:
        for variant in (None, "fp16", "a.b"):
            assert with_variant(name, variant) == _add_variant(name, variant)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', '{"weight_map": {"a": ["b"]}}', "\xff"],
)
def test_broken_index(text, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=f"{path} is not the index of a sharded checkpoint .* Download it again"):
        shard_names(str(path))


@pytest.mark.parametrize("shard", ["../x", "/x", "a/x", ".", "..", "", "a/../x", 3, None])
def test_shards_stay_in_their_folder(shard, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "good.safetensors", "b": shard}}))
    with pytest.raises(CheckpointError, match="names the shard .* which is not a file beside it. It was not read"):
        shard_names(str(path))


def test_index_without_shards_or_metadata(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="names no shards"):
        shard_names(str(path))
    path.write_text('{"weight_map": {"a": "2", "b": "1", "c": "2"}}')
    assert shard_names(str(path)) == ["1", "2"]


# The Hub and the cache


LOAD_AND_PRINT = """
import json, sys
library, inputs = sys.argv[1], json.loads(sys.argv[2])
if library == "transformers":
    import torch
    from transformers import EsmForMaskedLM as Model
    inputs = torch.tensor(inputs)
else:
    sys.modules["torch"] = None  # we don't need it, and it takes seconds
    from mlx_esm_hf import MLXEsmForMaskedLM as Model
print(json.dumps(Model.from_pretrained("someone/tiny-esm")(inputs).logits.tolist()))
"""


def load_elsewhere(library, environment):
    """Load and run the model by its id in a process of its own, and compare."""
    inputs = [[0, 20, 15, 32, 6, 2]]
    command = [sys.executable, "-c", LOAD_AND_PRINT, library, json.dumps(inputs)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr)
    with torch.no_grad():
        expected = torch_model()(torch.tensor(inputs)).logits
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), expected, atol=1e-5 * expected.abs().max().item())


def downloads(server):
    """The names of the files that were sent so far."""
    places = ("/resolve/", "/cdn/")
    sent = [path for method, path, _ in server.requests if method == "GET" and any(place in path for place in places)]
    return [path.rpartition("/")[2] for path in sent]


def test_cache_is_shared(tmp_path):
    """By id from the Hub into the cache of HF_HOME; from there, the Hub being gone, to transformers."""
    save_shards(torch_model(), tmp_path / "repo")
    server = hub.Hub({(ID, "main"): tmp_path / "repo"})
    with hub.serve(server) as url:
        environment = hub.environment(url, tmp_path / "home")
        load_elsewhere("mlx_esm_hf", environment)
    got = downloads(server)
    assert sorted(got) == sorted(file.name for file in (tmp_path / "repo").iterdir())  # each file once, and no other
    load_elsewhere("transformers", environment | {"HF_HUB_OFFLINE": "1"})


def test_offline_without_cache(tmp_path):
    environment = hub.environment(closed_port(), tmp_path / "home", HF_HUB_OFFLINE="1")
    with pytest.raises(OSError, match="We couldn't connect to .* and couldn't find them in the") as error:
        load_elsewhere("mlx_esm_hf", environment)
    assert "Check your internet connection" in str(error.value)


@pytest.fixture
def no_network(monkeypatch):
    """No one listens where the Hub should be; huggingface_hub tries again without waiting."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.use(monkeypatch, closed_port())


def test_no_network_and_no_cache(no_network, tmp_path):
    with pytest.raises(OSError, match="We couldn't connect to .* and couldn't find them in the"):
        MLXEsmForMaskedLM.from_pretrained(ID, cache_dir=tmp_path / "cache")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub with one repo in several formats, a revision to each, and a private one."""
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


@pytest.mark.parametrize("revision", FORMATS)
def test_revisions(revision, server, tmp_path, monkeypatch):
    """Each format from its revision, online, then offline by name and by commit; the cache knows what is not there."""
    value = list(FORMATS).index(revision)
    options = {"cache_dir": tmp_path / "cache"}
    model = MLXEsmForMaskedLM.from_pretrained(ID, revision=revision, **options)
    assert (model.lm_head.bias == value).all()
    assert any(revision in path for _, path, _ in server.requests)
    hub.use(monkeypatch, closed_port())
    for name in (revision, server.commit(ID, revision)):
        again = MLXEsmForMaskedLM.from_pretrained(ID, revision=name, local_files_only=True, **options)
        assert (again.lm_head.bias == value).all()
    there = theirs("ForMaskedLM").from_pretrained(ID, revision=revision, local_files_only=True, **options)
    assert_close(run(model), run(there))
    with pytest.raises(OSError):
        MLXEsmForMaskedLM.from_pretrained(ID, revision="main", local_files_only=True, **options)


@pytest.mark.parametrize("format", ["save", "save_bin_shards"])
def test_one_question(format, server, tmp_path, request):
    """What is in the cache costs one question, for the commit that config and weights are of; and so it does when
    the answer stays out."""
    options = {"revision": format, "cache_dir": tmp_path / "cache"}
    MLXEsmForMaskedLM.from_pretrained(ID, **options)
    del server.requests[:]
    MLXEsmForMaskedLM.from_pretrained(ID, **options)
    assert [path for _, path, _ in server.requests] == [f"/api/models/{ID}/revision/{format}"]
    request.getfixturevalue("no_network")
    MLXEsmForMaskedLM.from_pretrained(ID, **options)


def test_force_download(server, tmp_path):
    for _ in range(2):
        del server.requests[:]
        MLXEsmForMaskedLM.from_pretrained(ID, cache_dir=tmp_path / "cache", force_download=True)
        assert downloads(server) == ["config.json", "model.safetensors"]


def test_config_of_another_repo(server, tmp_path):
    """Its revision is its own."""
    (tmp_path / "no_weights").mkdir()
    torch_model().config.save_pretrained(tmp_path / "no_weights")
    server.push("someone/config", tmp_path / "no_weights")
    (tmp_path / "save" / "config.json").unlink()
    server.push(ID, tmp_path / "save")
    MLXEsmForMaskedLM.from_pretrained(ID, config="someone/config", cache_dir=tmp_path / "cache")


def test_token(server, tmp_path):
    """It is sent with every request to the Hub, and to no other host; without it the repo is not there."""
    options = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(OSError, match="(?s)someone/secret is not a local folder .* pass a token"):
        MLXEsmForMaskedLM.from_pretrained("someone/secret", token=False, **options)
    with pytest.raises(OSError, match="Invalid credentials in Authorization header"):
        MLXEsmForMaskedLM.from_pretrained("someone/secret", token="hf_wrong", **options)
    del server.requests[:]
    MLXEsmForMaskedLM.from_pretrained("someone/secret", token="hf_secret", **options)
    assert {token for _, path, token in server.requests if "/cdn/" not in path} == {"hf_secret"}
    assert [token for _, path, token in server.requests if "/cdn/" in path] == [None]


def test_absent_on_the_hub(server, tmp_path):
    options = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(OSError, match="someone/absent is not a local folder and is not a valid model identifier"):
        MLXEsmForMaskedLM.from_pretrained("someone/absent", **options)
    with pytest.raises(OSError, match="v9 is not a valid git identifier"):
        MLXEsmForMaskedLM.from_pretrained(ID, revision="v9", **options)
    with pytest.raises(OSError, match=f"{ID} holds none of model.fp16.safetensors, .*no weights to load. Offline"):
        MLXEsmForMaskedLM.from_pretrained(ID, variant="fp16", **options)


def test_missing_shard_on_the_hub(server, tmp_path):
    shard = sorted((tmp_path / "save_shards").glob("*-of-*"))[1]
    shard.unlink()
    server.push(ID, tmp_path / "save_shards", "save_shards")
    with pytest.raises(OSError, match=f"{ID} does not appear to have .*{shard.name}"):
        MLXEsmForMaskedLM.from_pretrained(ID, revision="save_shards", cache_dir=tmp_path / "cache")


def test_weights_without_network(server, tmp_path):
    """The config is in the cache, the weights are not."""
    mlx_esm_hf.MLXEsmConfig.from_pretrained(ID, cache_dir=tmp_path / "cache")
    with pytest.raises(OSError, match="no weights to load. Offline, only what is in the cache counts"):
        MLXEsmForMaskedLM.from_pretrained(ID, cache_dir=tmp_path / "cache", local_files_only=True)


# A Hub in trouble


@pytest.fixture
def patient(monkeypatch):
    """huggingface_hub tries again without waiting."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


def assert_whole(cache):
    """Every content that the cache holds is the one that it is called by; nothing is left of others."""
    for file in Path(cache).glob("models--*/blobs/*"):
        assert file.name == etag("x.bin" if len(file.name) == 64 else "x.json", file.read_bytes())


TROUBLE = [
    ("HEAD .*model", 401, "there is no token, or it is not valid: log in"),
    ("HEAD .*model", 403, "answered 403 .*the token may not do that"),
    ("HEAD .*model", 429, "answered 429 .*too many requests: wait some minutes"),
    ("HEAD .*model", 500, "answered 500 .*it is in trouble: do it again later"),
    ("GET /cdn/", 403, "answered 403"),
    ("GET /cdn/", 404, "answered 404"),
    ("GET /cdn/", 416, "answered 416 .*do it again, the download begins anew"),
    ("GET /cdn/", 429, "answered 429 .*too many requests"),
    ("GET /cdn/", 500, "answered 500 .*do it again later"),
    ("GET /cdn/", "cut", None),
    ("GET /cdn/", "corrupt", "arrived damaged: its checksum is not [0-9a-f]{64}. It was removed from the cache"),
]


@pytest.mark.parametrize("format", ["save", "save_shards", "save_bin"])
@pytest.mark.parametrize(("request_", "kind", "message"), TROUBLE)
def test_trouble(format, request_, kind, message, server, patient, tmp_path):
    """An error in a sentence, nothing broken in the cache, and all is well when the trouble is over. A connection that
    is cut is taken up where it ended."""
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


def test_cut_download_goes_on_where_it_ended(server, patient, tmp_path, monkeypatch):
    """With the piece of 10 MB (here, 1000 bytes) that was on its way."""
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
    with pytest.raises(OSError, match="the connection to .* failed .*Try again: what is whole is kept"):
        MLXEsmForMaskedLM.from_pretrained(ID, cache_dir=tmp_path / "cache")
    assert_whole(tmp_path / "cache")
    server.faults.clear()
    MLXEsmForMaskedLM.from_pretrained(ID, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("model_class", [MLXEsmForMaskedLM, mlx_esm_hf.MLXAutoModelForMaskedLM])
@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        ("GET .*config.json", "corrupt", "config.json arrived damaged: its checksum is not [0-9a-f]{40}"),
        ("HEAD .*config.json", 403, "answered 403 .*the token may not do that"),
        ("HEAD .*config.json", 429, "answered 429 .*too many requests: wait some minutes"),
        ("GET .*config.json", 500, "answered 500 .*do it again later"),
        ("GET .*config.json", "cut", "the connection to .* failed .*Try again"),
    ],
)
def test_trouble_with_the_config(model_class, request_, kind, message, server, patient, tmp_path):
    server.fail(request_, kind, 99)
    with pytest.raises(OSError, match=message) as error:
        model_class.from_pretrained(ID, cache_dir=tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert_whole(tmp_path / "cache")
    server.faults.clear()
    model_class.from_pretrained(ID, cache_dir=tmp_path / "cache")


def test_damaged_shard(server, patient, tmp_path):
    """It alone goes, and it alone is fetched again; so does a damaged index."""
    options = {"revision": "save_shards", "cache_dir": tmp_path / "cache"}
    server.fail("GET /cdn/.*/model-00002", "corrupt")
    with pytest.raises(OSError, match="model-00002.* arrived damaged"):
        MLXEsmForMaskedLM.from_pretrained(ID, **options)
    del server.requests[:]
    MLXEsmForMaskedLM.from_pretrained(ID, **options)
    assert [name[:11] for name in downloads(server)] == ["model-00002"]
    options["cache_dir"] = tmp_path / "other"
    server.fail("GET .*index.json", "corrupt")
    with pytest.raises(OSError, match="index.json arrived damaged: its checksum is not [0-9a-f]{40}"):
        MLXEsmForMaskedLM.from_pretrained(ID, **options)
    MLXEsmForMaskedLM.from_pretrained(ID, **options)


def test_trouble_with_the_weights_in_the_cache(server, patient, tmp_path):
    """What is there is taken, whatever the Hub says."""
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


def test_weights_of_what_is_not_there(server, tmp_path):
    options = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(OSError, match="has no repository someone/absent, or it is private: log in"):
        checkpoint_files("someone/absent", **options)
    with pytest.raises(OSError, match="has no branch, tag or commit 'v9'"):
        checkpoint_files(ID, revision="v9", **options)
    with pytest.raises(OSError, match="Repo id must"):
        checkpoint_files("a/b/c", **options)


def test_subfolder(server, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "save_shards").rename(tmp_path / "deep" / "sub")
    server.push(ID, tmp_path / "deep")
    options = {"subfolder": "sub", "cache_dir": tmp_path / "cache"}
    model = MLXEsmForMaskedLM.from_pretrained(ID, **options)
    there = theirs("ForMaskedLM").from_pretrained(ID, local_files_only=True, **options)
    assert_close(run(model), run(there))


@pytest.mark.parametrize("shards", [2, 7])  # ESM-2 3B and 15B
def test_layout_of_the_large_ones(shards, server, tmp_path):
    """`.bin` shards of the published names, as few and as many."""
    state = torch_model().state_dict()
    keys, weight_map = list(state), {}
    (tmp_path / "large").mkdir()
    torch_model().config.save_pretrained(tmp_path / "large")
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        torch.save({key: state[key] for key in keys[number::shards]}, tmp_path / "large" / name)
        weight_map |= dict.fromkeys(keys[number::shards], name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / "large" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    server.push("facebook/large", tmp_path / "large")
    model = MLXEsmForMaskedLM.from_pretrained("facebook/large", cache_dir=tmp_path / "cache")
    assert_close(run(model), run(torch_model()))


def start(environment, code=LOAD_AND_PRINT):
    command = [sys.executable, "-c", code, "mlx_esm_hf", "[[0, 20, 2]]"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_two_processes_at_once(tmp_path):
    """They share a cache, load the same, and each file comes once."""
    save_shards(torch_model(), tmp_path / "repo")
    server = hub.Hub({(ID, "main"): tmp_path / "repo"})
    with hub.serve(server) as url:
        both = [start(hub.environment(url, tmp_path / "home")) for _ in range(2)]
        answers = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    large = [name for name in downloads(server) if name.endswith(".safetensors")]
    assert sorted(large) == sorted(file.name for file in (tmp_path / "repo").glob("*.safetensors"))


def test_killed_download_is_taken_up_again(tmp_path):
    """The shards that were whole are not fetched again."""
    save_shards(torch_model(), tmp_path / "repo")
    server = hub.Hub({(ID, "main"): tmp_path / "repo"})
    answer, last, processes = server.answer, "model-00007-of-00007.safetensors", []

    def kill_at_the_last(request):
        if request.path.endswith(last) and request.method == "GET":
            others = len(list((tmp_path / "repo").glob("*.safetensors"))) - 1
            while len(list((tmp_path / "home").rglob("snapshots/*/*.safetensors"))) < others:
                time.sleep(0.01)
            processes[0].kill()
        return answer(request)

    assert (tmp_path / "repo" / last).exists()
    with hub.serve(server) as url:
        server.answer = kill_at_the_last
        processes.append(start(hub.environment(url, tmp_path / "home")))
        processes[0].communicate()
        assert processes[0].returncode < 0
        server.answer = answer
        del server.requests[:]
        load_elsewhere("mlx_esm_hf", hub.environment(url, tmp_path / "home"))
        assert downloads(server) == [last]
