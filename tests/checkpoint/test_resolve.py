"""Locating files in a folder, in the cache shared with transformers, and on a local Hub."""

import json
import subprocess
import sys
import time

import pytest

import mlx_esm_hf
from mlx_esm_hf import MLXEsmForMaskedLM
from mlx_esm_hf.checkpoint.resolve import checkpoint_files, shard_names, with_variant
from mlx_esm_hf.errors import CheckpointError
from tests import hub
from tests.checkpoint.cache import ID, ROOT, closed_port, downloads, names
from tests.checkpoints import FORMATS, assert_close, run, save_shards, theirs, torch, torch_model

ORDER = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_order(variant, tmp_path):
    """Safetensors precede .bin, and one file precedes shards. use_safetensors selects one format."""
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
    with pytest.raises(OSError, match=f"{tmp_path} contains no weights: none of .*pytorch_model.* was found.$"):
        checkpoint_files(str(tmp_path), variant)


def test_variant_names():
    """Names equal those of transformers."""
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
    with pytest.raises(CheckpointError, match="lists the shard .* which is not in its folder. It was not read"):
        shard_names(str(path))


def test_index_without_shards_or_metadata(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="lists no shards"):
        shard_names(str(path))
    path.write_text('{"weight_map": {"a": "2", "b": "1", "c": "2"}}')
    assert shard_names(str(path)) == ["1", "2"]


LOAD_AND_PRINT = """
import json, sys
library, inputs = sys.argv[1], json.loads(sys.argv[2])
if library == "transformers":
    import torch
    from transformers import EsmForMaskedLM as Model
    inputs = torch.tensor(inputs)
else:
    sys.modules["torch"] = None  # not needed, and importing it takes seconds
    from mlx_esm_hf import MLXEsmForMaskedLM as Model
print(json.dumps(Model.from_pretrained("someone/tiny-esm")(inputs).logits.tolist()))
"""


def load_elsewhere(library, environment):
    """Load and run the model by its id in another process, and compare the results."""
    inputs = [[0, 20, 15, 32, 6, 2]]
    command = [sys.executable, "-c", LOAD_AND_PRINT, library, json.dumps(inputs)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr)
    with torch.no_grad():
        expected = torch_model()(torch.tensor(inputs)).logits
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), expected, atol=1e-5 * expected.abs().max().item())


def test_cache_is_shared(tmp_path):
    """A model is downloaded into the cache of HF_HOME, and transformers loads it from there when the Hub is gone."""
    save_shards(torch_model(), tmp_path / "repo")
    server = hub.Hub({(ID, "main"): tmp_path / "repo"})
    with hub.serve(server) as url:
        environment = hub.environment(url, tmp_path / "home")
        load_elsewhere("mlx_esm_hf", environment)
    got = downloads(server)
    assert sorted(got) == sorted(file.name for file in (tmp_path / "repo").iterdir())  # each file exactly once
    load_elsewhere("transformers", environment | {"HF_HUB_OFFLINE": "1"})


def test_offline_without_cache(tmp_path):
    environment = hub.environment(closed_port(), tmp_path / "home", HF_HUB_OFFLINE="1")
    with pytest.raises(OSError, match="We couldn't connect to .* and couldn't find them in the") as error:
        load_elsewhere("mlx_esm_hf", environment)
    assert "Check your internet connection" in str(error.value)


@pytest.fixture
def no_network(monkeypatch):
    """Point to a closed port instead of the Hub, and retry without waiting."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.use(monkeypatch, closed_port())


def test_no_network_and_no_cache(no_network, tmp_path):
    with pytest.raises(OSError, match="We couldn't connect to .* and couldn't find them in the"):
        MLXEsmForMaskedLM.from_pretrained(ID, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("revision", FORMATS)
def test_revisions(revision, server, tmp_path, monkeypatch):
    """Load each format online, then offline by name and by commit. The cache also knows which files do not exist."""
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
def test_one_request(format, server, tmp_path, request):
    """Loading from the cache takes one request, for the commit of config and weights, even if it is not answered."""
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
    """It has its own revision."""
    (tmp_path / "no_weights").mkdir()
    torch_model().config.save_pretrained(tmp_path / "no_weights")
    server.push("someone/config", tmp_path / "no_weights")
    (tmp_path / "save" / "config.json").unlink()
    server.push(ID, tmp_path / "save")
    MLXEsmForMaskedLM.from_pretrained(ID, config="someone/config", cache_dir=tmp_path / "cache")


def test_token(server, tmp_path):
    """The token is sent with every request to the Hub and to no other host. The repository is not found without it."""
    options = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(OSError, match="(?s)someone/secret is not a local folder .* pass a token"):
        MLXEsmForMaskedLM.from_pretrained("someone/secret", token=False, **options)
    with pytest.raises(OSError, match="Invalid credentials in Authorization header"):
        MLXEsmForMaskedLM.from_pretrained("someone/secret", token="hf_wrong", **options)
    del server.requests[:]
    MLXEsmForMaskedLM.from_pretrained("someone/secret", token="hf_secret", **options)
    assert {token for _, path, token in server.requests if "/cdn/" not in path} == {"hf_secret"}
    assert [token for _, path, token in server.requests if "/cdn/" in path] == [None]


def test_missing_on_the_hub(server, tmp_path):
    options = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(OSError, match="someone/absent is not a local folder and is not a valid model identifier"):
        MLXEsmForMaskedLM.from_pretrained("someone/absent", **options)
    with pytest.raises(OSError, match="v9 is not a valid git identifier"):
        MLXEsmForMaskedLM.from_pretrained(ID, revision="v9", **options)
    with pytest.raises(
        OSError, match=f"{ID} contains no weights: none of model.fp16.safetensors, .* was found. Offline"
    ):
        MLXEsmForMaskedLM.from_pretrained(ID, variant="fp16", **options)


def test_missing_shard_on_the_hub(server, tmp_path):
    shard = sorted((tmp_path / "save_shards").glob("*-of-*"))[1]
    shard.unlink()
    server.push(ID, tmp_path / "save_shards", "save_shards")
    with pytest.raises(OSError, match=f"{ID} does not appear to have .*{shard.name}"):
        MLXEsmForMaskedLM.from_pretrained(ID, revision="save_shards", cache_dir=tmp_path / "cache")


def test_weights_without_network(server, tmp_path):
    """The config is in the cache, but the weights are not."""
    mlx_esm_hf.MLXEsmConfig.from_pretrained(ID, cache_dir=tmp_path / "cache")
    with pytest.raises(OSError, match="contains no weights: .* was found. Offline, only files in the cache are found"):
        MLXEsmForMaskedLM.from_pretrained(ID, cache_dir=tmp_path / "cache", local_files_only=True)


def test_subfolder(server, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "save_shards").rename(tmp_path / "deep" / "sub")
    server.push(ID, tmp_path / "deep")
    options = {"subfolder": "sub", "cache_dir": tmp_path / "cache"}
    model = MLXEsmForMaskedLM.from_pretrained(ID, **options)
    there = theirs("ForMaskedLM").from_pretrained(ID, local_files_only=True, **options)
    assert_close(run(model), run(there))


@pytest.mark.parametrize("shards", [2, 7])  # ESM-2 3B and 15B
def test_layout_of_the_large_models(shards, server, tmp_path):
    """The number and names of `.bin` shards are those of published models."""
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
    """They share a cache and load the same model, and each file is downloaded once."""
    save_shards(torch_model(), tmp_path / "repo")
    server = hub.Hub({(ID, "main"): tmp_path / "repo"})
    with hub.serve(server) as url:
        both = [start(hub.environment(url, tmp_path / "home")) for _ in range(2)]
        answers = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    large = [name for name in downloads(server) if name.endswith(".safetensors")]
    assert sorted(large) == sorted(file.name for file in (tmp_path / "repo").glob("*.safetensors"))


def test_killed_download_resumes(tmp_path):
    """Complete shards are not downloaded again."""
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
