"""Publishing on a Hub on this machine, by huggingface_hub's own client, and loading what was published."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Lock

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, PreTrainedModel

import mlx_esm_hf
from mlx_esm_hf import (
    Esm1Tokenizer,
    EsmTokenizer,
    MLXEsm1Config,
    MLXEsmConfig,
    MLXEsmForMaskedLM,
    MLXEsmForSequenceClassification,
)
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.hub import publish
from mlx_esm_hf.hub.files import read_checkpoint
from tests.hub import Hub, Repository, environment, serve, use
from tests.hub.repository import etag
from tests.hub.server import Answer
from tests.jobs.models import write_model
from tests.tiny import SIZE, VOCABULARY
from tests.vocabulary import write_vocabulary

ROOT = Path(mlx_esm_hf.__file__).parents[1]
ID, TOKEN = "me/esm", "hf_me"
IDS = [[0, 20, 15, 11, 2]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint with its tokenizer, in one file."""
    return write_model(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, made):
    """The same in shards."""
    folder = tmp_path_factory.mktemp("sharded")
    MLXEsmForMaskedLM.from_pretrained(made).save_pretrained(folder, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(made).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "checkpoint"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Empty, and this process talks to it; huggingface_hub waits for nothing before it tries again."""
    hub = Hub(users={TOKEN: "me", "hf_you": "you"})
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve(hub) as endpoint:
        use(monkeypatch, endpoint)
        hub.endpoint = endpoint
        yield hub


def names(folder):
    return {file.name for file in Path(folder).iterdir() if not file.name.startswith(".")}


def logits(model):
    return np.array(model(mx.array(IDS)).logits)


def push(folder, repo_id=ID, **options):
    return publish(folder, repo_id, **{"token": TOKEN} | options)


def load(repo_id=ID, **options):
    return MLXEsmForMaskedLM.from_pretrained(repo_id, **options)


# What goes, and comes back


def test_push_and_load(hub, made):
    done = push(made, commit_message="First", commit_description="of many")
    files = hub.repos[ID].files()
    assert set(files) == names(made) | {".gitattributes", "README.md"} == set(done.files) | {".gitattributes"}
    for name in names(made):
        assert files[name] == (made / name).read_bytes()
        assert done.files[name] == (made / name).stat().st_size
    commit = hub.repos[ID].commits[done.commit.oid]
    assert (commit.message, commit.description) == ("First", "of many")
    assert done.commit.commit_url == f"{hub.endpoint}/{ID}/commit/{hub.commit(ID, 'main')}"
    assert len(hub.repos[ID].commits) == 2  # that of the new repository, and this one
    np.testing.assert_array_equal(logits(load()), logits(load(str(made))))


ELSEWHERE = """
import json, sys
library, repo_id = sys.argv[1:]
if library == "transformers":
    from transformers import AutoModelForMaskedLM as Model
    tensors = "pt"
else:
    sys.modules["torch"] = None  # we don't need it, and it takes seconds
    from mlx_esm_hf import MLXAutoModelForMaskedLM as Model
    tensors = "mlx"
from transformers import AutoTokenizer
inputs = AutoTokenizer.from_pretrained(repo_id)("MKT", return_tensors=tensors)
print(json.dumps(Model.from_pretrained(repo_id)(**inputs).logits.tolist()))
"""


def run_elsewhere(hub, home, code, *arguments, **variables):
    """In a process that knows nothing of ours, with a cache of its own."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(hub.endpoint, home, **variables), capture_output=True, text=True
    )


@pytest.mark.parametrize("library", ["mlx_esm_hf", "transformers"])
def test_load_elsewhere(hub, sharded, tmp_path, library):
    push(sharded, private=True)
    refused = run_elsewhere(hub, tmp_path / "home", ELSEWHERE, library, ID)
    assert refused.returncode and "is not a local folder and is not a valid model identifier" in refused.stderr
    done = run_elsewhere(hub, tmp_path / "home", ELSEWHERE, library, ID, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), logits(load(str(sharded))), atol=1e-4)


def test_push_of_a_model(hub, made):
    """As transformers' method, with the same arguments."""
    ours = inspect.signature(MLXEsmForMaskedLM.push_to_hub).parameters
    theirs = inspect.signature(PreTrainedModel.push_to_hub).parameters
    assert list(ours) == list(theirs)
    assert {name: p.default for name, p in ours.items()} == {name: p.default for name, p in theirs.items()}
    model = load(str(made))
    info = model.push_to_hub(ID, token=TOKEN, max_shard_size="40KB", tags=["tiny"], commit_message="Shards")
    assert hub.repos[ID].commits[info.oid].message == "Shards"
    assert sum(name.endswith(".safetensors") for name in hub.repos[ID].files()) > 2
    assert "tiny" in ModelCard(hub.repos[ID].files()["README.md"].decode()).data.tags
    np.testing.assert_array_equal(logits(load()), logits(model))
    info = model.push_to_hub(ID, token=TOKEN)
    assert hub.repos[ID].commits[info.oid].message == "Upload model"
    np.testing.assert_array_equal(logits(load()), logits(model))


def test_save_and_push(hub, made, tmp_path):
    load(str(made)).save_pretrained(tmp_path / "esm", push_to_hub=True, token=TOKEN, private=True)
    assert hub.repos[ID].private and "model.safetensors" in hub.repos[ID].files()


ESM1 = {"vocab_size": 35, "pad_token_id": 1, "mask_token_id": 33}


@pytest.mark.parametrize("kind", ["ESM-2", "ESM-1"])
def test_push_of_config_and_tokenizer(hub, tmp_path, kind):
    """transformers' own methods, which ours inherit; each adds its files, and the card of the first one stays."""
    if kind == "ESM-1":
        config, tokenizer = MLXEsm1Config(**SIZE), Esm1Tokenizer()
    else:
        config = MLXEsmConfig(**VOCABULARY, **SIZE)
        tokenizer = EsmTokenizer(write_vocabulary(tmp_path))
    MLXEsmForMaskedLM(config).push_to_hub(ID, token=TOKEN)
    card = hub.repos[ID].files()["README.md"]
    info = config.push_to_hub(ID, token=TOKEN, commit_message="Config")
    assert hub.repos[ID].commits[info.oid].message == "Config"
    tokenizer.push_to_hub(ID, token=TOKEN)
    assert hub.repos[ID].files()["README.md"] == card
    assert {"config.json", "model.safetensors", "vocab.txt"} <= set(hub.repos[ID].files())
    back = AutoTokenizer.from_pretrained(ID)
    assert type(back) is type(tokenizer) and back("MKT")["input_ids"] == tokenizer("MKT")["input_ids"]
    assert type(config).from_pretrained(ID).to_diff_dict() == config.to_diff_dict()
    assert load().config.hidden_size == config.hidden_size


# Branches, pull requests, private repositories


def test_branch(hub, made, sharded):
    push(made)
    push(sharded, revision="shards")
    assert "model.safetensors" in hub.repos[ID].files("main")
    assert "model.safetensors" not in hub.repos[ID].files("shards")  # stale there, and there only
    np.testing.assert_array_equal(logits(load(revision="shards")), logits(load()))


def test_pull_request(hub, made, sharded):
    """By someone who may not write; also with a branch."""
    push(made)
    before = hub.commit(ID, "main")
    done = push(sharded, token="hf_you", create_pr=True)
    assert done.commit.pr_url == f"{hub.endpoint}/{ID}/discussions/1"
    assert hub.commit(ID, "main") == before
    assert "model.safetensors" not in hub.repos[ID].files("refs/pr/1")
    again = push(sharded, token="hf_you", create_pr=True, revision="main")
    assert again.commit.pr_url == f"{hub.endpoint}/{ID}/discussions/2"
    push(made, revision="refs/pr/1")  # its owner goes on with it
    assert "model.safetensors" in hub.repos[ID].files("refs/pr/1")


def test_private(hub, made):
    push(made, private=True)
    assert hub.repos[ID].private
    push(made, private=True)
    push(made, "me/open")
    commit = hub.commit("me/open", "main")
    with pytest.raises(ValueError, match="me/open is there already, and it is public: nothing was sent"):
        push(made, "me/open", private=True)
    assert hub.commit("me/open", "main") == commit


def test_name_without_owner(hub, made):
    assert push(made, "esm").repo_id == ID


# Again, and other weights


def sent(hub):
    """How many bytes of large files were sent since the last question."""
    total = sum(hub.sent.values())
    hub.sent.clear()
    return total


def test_again_sends_nothing(hub, sharded):
    push(sharded)
    assert sent(hub) == sum(file.stat().st_size for file in sharded.glob("*.safetensors"))
    commit = hub.commit(ID, "main")
    done = push(sharded)
    assert (sent(hub), hub.commit(ID, "main"), done.commit.oid) == (0, commit, commit)


def test_stale_weights_go_in_the_same_commit(hub, made, sharded, tmp_path):
    """What would be read instead of the new weights, or is named by no index any more; and nothing else."""
    push(sharded)
    others = {"onnx/model.onnx": b"x", "model.fp16.safetensors": b"y", "notes.txt": b"z"}
    hub.repos[ID].commit(hub.repos[ID].files() | others, "Others")
    rest = set(others) | {"README.md", ".gitattributes"}
    for folder, stale in ((made, sharded), (sharded, made)):
        commits = len(hub.repos[ID].commits)
        done = push(folder)
        assert len(hub.repos[ID].commits) == commits + 1
        assert set(done.deleted) == names(stale) - names(folder)
        assert set(hub.repos[ID].files()) == names(folder) | rest
        np.testing.assert_array_equal(logits(load(cache_dir=tmp_path / folder.name)), logits(load(str(made))))


def test_variants(hub, made, tmp_path):
    model = load(str(made))
    model.save_pretrained(tmp_path / "v")
    model.half().save_pretrained(tmp_path / "v", variant="fp16", max_shard_size="40KB")
    push(tmp_path / "v")
    assert set(hub.repos[ID].files()) >= names(tmp_path / "v")
    assert load(variant="fp16", dtype="float16").dtype == mx.float16


# What goes wrong on the way


@pytest.mark.parametrize(
    ("request_", "kind", "times", "message"),
    [
        ("POST .*/preupload/", 401, 1, "answered 401 .*there is no token, or it is not valid: log in"),
        ("POST .*/preupload/", 403, 1, "answered 403 .*the token may not do that"),
        ("POST .*/preupload/", 429, 9, "answered 429 .*too many requests: wait some minutes"),
        ("POST .*objects/batch", 500, 9, "answered 500 .*it is in trouble: do it again later"),
        ("PUT /cdn/", 500, 99, "answered 500 .*it is in trouble: do it again later"),
        ("PUT /cdn/", "cut", 99, "the connection to .* failed .*Try again: what is whole is kept"),
        ("PUT /cdn/", "corrupt", 99, "answered 400 .The uploaded file is not the one that was announced"),
        ("POST /lfs/verify", 500, 99, "answered 500"),
        ("POST .*/commit/", 500, 1, "answered 500 .*it is in trouble: do it again later"),
        ("POST .*/commit/", "cut", 1, "the connection to .* failed"),
        ("POST .*/commit/", 412, 1, "answered 412 .*the repository has changed meanwhile: do it again"),
    ],
)
def test_faults_leave_what_was_there(hub, made, sharded, tmp_path, request_, kind, times, message):
    """An error in a sentence; the repository is as before; the same again, once the trouble is over, sends the rest."""
    push(made)
    before = hub.commit(ID, "main")
    sent(hub)
    hub.fail(request_, kind, times)
    with pytest.raises(OSError, match=f"{sharded} was not published as {ID}: .*{message}") as error:
        push(sharded)
    assert "\n" not in str(error.value)
    assert hub.commit(ID, "main") == before
    np.testing.assert_array_equal(logits(load(cache_dir=tmp_path / "before")), logits(load(str(made))))
    hub.faults.clear()
    push(sharded)
    assert "model.safetensors" not in hub.repos[ID].files()
    np.testing.assert_array_equal(logits(load(cache_dir=tmp_path / "after")), logits(load(str(made))))


@pytest.mark.parametrize("kind", [500, "cut"])
@pytest.mark.parametrize("request_", ["PUT /cdn/", "POST .*objects/batch", "POST .*/preupload/"])
def test_short_trouble_is_gone_through(hub, sharded, request_, kind):
    hub.fail(request_, kind, 2)
    push(sharded)
    np.testing.assert_array_equal(logits(load()), logits(load(str(sharded))))


def test_broken_upload_sends_only_the_rest(hub, sharded):
    """One of the shards does not get through; the others are not sent again."""
    shards = sorted(sharded.glob("*.safetensors"))
    broken = etag(shards[1].name, shards[1].read_bytes())
    hub.fail(f"PUT /cdn/{broken}", 500, 99)
    with pytest.raises(OSError, match="answered 500"):
        push(sharded)
    assert len(hub.repos[ID].commits) == 1 and set(hub.repos[ID].files()) == {".gitattributes"}
    assert len(hub.repos[ID].objects) == len(shards) - 1
    hub.faults.clear()
    sent(hub)
    push(sharded)
    assert sent(hub) == shards[1].stat().st_size
    np.testing.assert_array_equal(logits(load()), logits(load(str(sharded))))


def test_large_files_in_parts(hub, made):
    hub.part_size = 10_000
    hub.fail("PUT /cdn/.*/3", 500)
    push(made)
    assert sum(method == "PUT" for method, _, _ in hub.requests) > 5
    np.testing.assert_array_equal(logits(load()), logits(load(str(made))))


def test_someone_else_pushes_meanwhile(hub, made, sharded):
    """The commit is refused, instead of mixing two checkpoints."""
    push(made)
    answer = hub.answer

    def push_before_commit(request):
        if "/commit/" in request.path:
            hub.repos[ID].commit(hub.repos[ID].files() | {"theirs": b""}, "Theirs")
        return answer(request)

    hub.answer = push_before_commit
    with pytest.raises(OSError, match="412 .*has changed meanwhile"):
        push(sharded)
    hub.answer = answer
    push(sharded)
    assert "theirs" in hub.repos[ID].files() and "model.safetensors" not in hub.repos[ID].files()


KILLED = """
import sys
from mlx_esm_hf.hub import publish
publish(sys.argv[1], "me/esm")
"""


def test_killed_upload(hub, sharded, tmp_path):
    """A process that dies in the middle leaves the repository as it was, and what has arrived is not sent again."""
    answer, processes, one_by_one = hub.answer, [], Lock()

    def kill_after_two(request):
        if "/lfs/verify/" not in request.path:
            return answer(request)
        with one_by_one:
            if len(hub.repos[ID].objects) == 2:
                processes[0].kill()
                processes[0].wait()
                return Answer(500)
            return answer(request)

    hub.answer = kill_after_two
    command = [sys.executable, "-c", KILLED, str(sharded)]
    variables = environment(hub.endpoint, tmp_path / "home", HF_TOKEN=TOKEN)
    processes.append(subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.DEVNULL))
    assert processes[0].wait() != 0
    hub.answer = answer
    assert set(hub.repos[ID].files()) == {".gitattributes"}
    there = set(hub.repos[ID].objects)
    assert len(there) == 2 < len(list(sharded.glob("*.safetensors")))
    sent(hub)
    push(sharded)
    assert not there & hub.sent.keys()
    np.testing.assert_array_equal(logits(load()), logits(load(str(sharded))))


def test_who_may(hub, made):
    with pytest.raises(OSError, match="401 .Invalid username or password.*log in"):
        push(made, token=False)
    with pytest.raises(OSError, match="403 .You don't have the rights to create a model under the namespace .you.*"):
        push(made, "you/esm")
    push(made, "you/esm", token="hf_you")
    with pytest.raises(OSError, match="403 .*you do not have write access"):
        push(made, "you/esm")
    push(made, "you/hidden", token="hf_you", private=True)
    with pytest.raises(OSError, match="403 .You don't have the rights"):  # it is not told that there is one
        push(made, "you/hidden", create_pr=True)
    with pytest.raises(OSError, match="has no branch, tag or commit 'refs/pr/7'"):
        push(made, "you/esm", token="hf_you", revision="refs/pr/7")


# The folder


def test_only_what_belongs_to_a_checkpoint(hub, folder):
    for name in (".git", "checkpoint-500"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").touch()
    stray = ["optimizer.safetensors", "training_args.bin", ".env", "model-00001-of-00002.safetensors", "notes.txt"]
    stray += ["pytorch_model.bin"]
    for name in stray:
        (folder / name).touch()
    (folder / "LICENSE").write_text("MIT")
    done = push(folder)
    assert set(done.left_out) == {*stray, ".git", "checkpoint-500"}
    assert done.left_out[".env"] == "hidden" and done.left_out["checkpoint-500"] == "a folder"
    assert "no part of a checkpoint" in done.left_out["notes.txt"] == done.left_out["optimizer.safetensors"]
    assert "weights that are not read" in done.left_out["pytorch_model.bin"]
    assert not {*stray, ".git/model.safetensors"} & set(hub.repos[ID].files())
    assert hub.repos[ID].files()["LICENSE"] == b"MIT"


def test_bin_only(hub, tmp_path):
    from tests.checkpoints import save_bin_shards, torch_model

    save_bin_shards(torch_model(), tmp_path / "bin")
    push(tmp_path / "bin")
    model = load()
    assert {name for name in hub.repos[ID].files() if ".bin" in name} <= names(tmp_path / "bin")
    model.save_pretrained(tmp_path / "safe")
    push(tmp_path / "safe")
    assert not [name for name in hub.repos[ID].files() if ".bin" in name]


def spoil(name, change):
    def spoiler(folder):
        file = folder / name
        content = change(file.read_bytes())
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)

    return spoiler


SHARD = "model-00002-of-00003.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def spoilers():
    yield "no config", spoil("config.json", lambda x: None), "holds no config.json: it is not a checkpoint"
    yield "no JSON", spoil("config.json", lambda x: x[:20]), "config.json is not JSON"
    yield "no model_type", spoil("config.json", lambda x: b"{}"), "names no model_type"
    yield "no shard", spoil(SHARD, lambda x: None), f"lacks {SHARD}, which model.safetensors.index.json names"
    yield "cut shard", spoil(SHARD, lambda x: x[:-7]), f"{SHARD} is not a whole safetensors file"
    yield "pointer", spoil(SHARD, lambda x: POINTER), "It is a Git LFS pointer, not the weights"
    yield "index", spoil("model.safetensors.index.json", lambda x: x[:-9]), "is not the index of a sharded checkpoint"
    yield "no index", spoil("model.safetensors.index.json", lambda x: None), "holds no weights"


@pytest.mark.parametrize(("spoiler", "message"), [pytest.param(s, m, id=name) for name, s, m in spoilers()])
def test_no_whole_checkpoint(hub, made, tmp_path, spoiler, message):
    """Refused before anything goes."""
    model = load(str(made))
    model.save_pretrained(tmp_path / "three", max_shard_size="40KB")
    assert SHARD in names(tmp_path / "three")
    spoiler(tmp_path / "three")
    with pytest.raises(CheckpointError, match=message):
        push(tmp_path / "three")
    assert not hub.requests


def test_shards_that_were_mixed_up(hub, made, tmp_path):
    load(str(made)).save_pretrained(tmp_path / "three", max_shard_size="40KB")
    shutil.copy(tmp_path / "three" / "model-00001-of-00003.safetensors", tmp_path / "three" / SHARD)
    with pytest.raises(CheckpointError, match=f"{SHARD} lacks 'esm.* which the index says it holds"):
        push(tmp_path / "three")
    assert not hub.requests


def test_dry_run(hub, made, sharded):
    first = push(made, dry_run=True)
    assert hub.repos == {} and not any(method in ("POST", "PUT") for method, _, _ in hub.requests)
    assert set(first.files) == names(made) | {"README.md"} and not first.deleted and first.commit is None
    done = push(made)
    assert done.files == first.files
    commit = hub.commit(ID, "main")
    second = push(sharded, dry_run=True, revision="new")
    assert second.deleted == ["model.safetensors"] and not second.kept_card
    assert hub.commit(ID, "main") == commit and "new" not in hub.repos[ID].refs


# The card


def card(hub, repo_id=ID):
    return ModelCard(hub.repos[repo_id].files()["README.md"].decode())


def test_card(hub, made):
    hub.repos["facebook/esm2"] = Repository()
    hub.repos["facebook/esm2"].commit({"README.md": b"---\nlicense: mit\n---\n"}, "Card")
    push(made, "me/made", base_model="facebook/esm2")
    data, text = card(hub, "me/made").data, card(hub, "me/made").text
    assert data.library_name == "transformers" and data.pipeline_tag == "fill-mask"
    assert data.base_model == "facebook/esm2" and data.license == "mit"
    assert {"mlx", "protein", "esm"} <= set(data.tags)
    parameters = sum(p.numel() for p in transformers.EsmForMaskedLM.from_pretrained(made).parameters())
    assert "EsmForMaskedLM" in text and "3 layers of width 32" in text and "float32" in text
    assert "facebook/esm2" in text
    assert abs(int(text.partition(" parameters")[0].rpartition(" ")[2].replace(",", "")) - parameters) < 100
    push(made, "me/licensed", license="apache-2.0")
    assert card(hub, "me/licensed").data.license == "apache-2.0" and card(hub, "me/licensed").data.base_model is None


def code_blocks(text):
    return [block.partition("```")[0] for block in text.split("```python\n")[1:]]


def test_the_lines_of_the_card_run(hub, made, tmp_path):
    push(made)
    blocks = code_blocks(card(hub).text)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        done = run_elsewhere(hub, tmp_path / f"home{number}", block + "\nprint(outputs.logits.shape)")
        assert done.returncode == 0, done.stderr
        assert "22, 33" in done.stdout


def test_card_of_a_model_from_the_hub(hub, made):
    """The model that was fine-tuned is named, and a repository pushed to itself names none."""
    push(made)
    model = MLXEsmForSequenceClassification.from_pretrained(ID, num_labels=2)
    model.push_to_hub("me/tuned", token=TOKEN)
    data = card(hub, "me/tuned").data
    assert data.base_model == ID and data.pipeline_tag == "text-classification"
    assert "MLXAutoModelForSequenceClassification" in card(hub, "me/tuned").text
    assert "AutoTokenizer" not in card(hub, "me/tuned").text  # there is none in the repository


def test_card_of_what_transformers_cannot_load(hub, folder, tmp_path):
    MLXEsmForMaskedLM(MLXEsm1Config(**SIZE)).push_to_hub("me/esm1", token=TOKEN)
    data, text = card(hub, "me/esm1").data, card(hub, "me/esm1").text
    assert data.library_name == "mlx" and "transformers cannot load it: it has no model_type 'esm1'" in text
    assert len(code_blocks(text)) == 1
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 4, "group_size": 32}}))
    push(folder)
    assert "quantized to 4 bits in groups of 32" in card(hub).text
    assert "transformers cannot load it: it is quantized for MLX" in card(hub).text
    assert "parameters" not in card(hub).text


def test_our_own_card_is_written_anew(hub, made, sharded, folder):
    """It would tell of the earlier weights; what its metadata say besides stays, and so does a card that was kept."""
    push(made, base_model="facebook/esm2", license="mit", tags=["tiny"])
    first = hub.commit(ID, "main")
    push(made)
    assert hub.commit(ID, "main") == first
    edited = hub.repos[ID].files()["README.md"].replace(b"license: mit", b"license: mit\ndatasets:\n- me/proteins")
    hub.repos[ID].commit(hub.repos[ID].files() | {"README.md": edited}, "On the site")
    (folder / "CONVERSION.md").write_text("8 bits")
    push(folder, tags=["small"])
    data, text = card(hub).data, card(hub).text
    assert "8 bits" in text and (data.base_model, data.license) == ("facebook/esm2", "mit")
    assert {"mlx", "tiny", "small"} <= set(data.tags) and data.datasets == ["me/proteins"]
    push(folder, base_model="facebook/other")
    assert card(hub).data.base_model == "facebook/other" and "(https://huggingface.co/facebook/other)" in card(hub).text
    mine = "".join(line for line in str(card(hub)).splitlines(keepends=True) if "writes this card anew" not in line)
    hub.repos[ID].commit(hub.repos[ID].files() | {"README.md": mine.encode()}, "Mine now")
    assert push(made, license="gpl-3.0").kept_card
    assert str(card(hub)) == mine


def test_tokenizer_first(hub, made):
    """transformers puts its template in the repository, which says nothing; the model's card comes in its place, unless
    somebody has filled it in."""
    tokenizer = AutoTokenizer.from_pretrained(made)
    tokenizer.push_to_hub(ID, token=TOKEN, tags=["tiny"])
    assert "[More Information Needed]" in card(hub).text
    load(str(made)).push_to_hub(ID, token=TOKEN)
    assert "[More Information Needed]" not in card(hub).text and "tiny" in card(hub).data.tags
    assert 'AutoTokenizer.from_pretrained("me/esm")' in card(hub).text and card(hub).data.pipeline_tag == "fill-mask"
    tokenizer.push_to_hub("me/filled", token=TOKEN)
    filled = hub.repos["me/filled"].files()["README.md"].replace(b"[More Information Needed]", b"Proteins", 1)
    hub.repos["me/filled"].commit(hub.repos["me/filled"].files() | {"README.md": filled}, "Mine")
    load(str(made)).push_to_hub("me/filled", token=TOKEN)
    assert hub.repos["me/filled"].files()["README.md"] == filled


def test_config_first(hub, made):
    MLXEsmConfig.from_pretrained(made).push_to_hub(ID, token=TOKEN)
    load(str(made)).push_to_hub(ID, token=TOKEN)
    assert "MLXAutoModelForMaskedLM" in card(hub).text
    np.testing.assert_array_equal(logits(load()), logits(load(str(made))))


def test_own_card(hub, folder):
    own = "---\nlicense: mit\n---\n# Mine\n"
    (folder / "README.md").write_text(own)
    push(folder, tags=["new"])
    assert card(hub).data.to_dict() == {"license": "mit", "tags": ["new"]} and "# Mine" in card(hub).text
    push(folder)
    assert hub.repos[ID].files()["README.md"] == own.encode()
    (folder / "README.md").unlink()
    kept = push(folder, tags=["new"])
    assert card(hub).data.tags == ["new"] and "# Mine" in card(hub).text and not kept.kept_card
    assert push(folder).kept_card
    commit = hub.commit(ID, "main")
    for metadata, message in (
        ("license: [1", "README.md: the lines between the two --- are not YAML"),
        ("mit", "README.md: the lines between the two --- are not YAML"),
        ("license: [1]", "Invalid metadata in README.md"),  # says the Hub
    ):
        (folder / "README.md").write_text(f"---\n{metadata}\n---\n")
        with pytest.raises(ValueError, match=message):
            push(folder)
    assert hub.commit(ID, "main") == commit


def test_conversion_report_is_in_the_card(hub, folder):
    (folder / "CONVERSION.md").write_text("Δ = 0")
    push(folder)
    assert "## Conversion\n\nΔ = 0" in card(hub).text and "CONVERSION.md" in hub.repos[ID].files()


def test_parameters(made, sharded):
    assert read_checkpoint(made).parameters == read_checkpoint(sharded).parameters > 10_000


def test_torch_reads_what_was_published(hub, sharded):
    push(sharded)
    model = transformers.AutoModelForMaskedLM.from_pretrained(ID)
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.tensor(IDS)).logits.numpy(), logits(load()), atol=1e-4)
