"""Publishing on a local Hub with the real client huggingface_hub, and loading what was published."""

import inspect
import json
import subprocess
import sys
from threading import Lock

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, PreTrainedModel

from mlx_esm_hf import (
    Esm1Tokenizer,
    EsmTokenizer,
    MLXEsm1Config,
    MLXEsmConfig,
    MLXEsmForMaskedLM,
)
from tests.hub import environment
from tests.hub.publishing import (
    ELSEWHERE,
    ID,
    IDS,
    ROOT,
    TOKEN,
    load,
    logits,
    names,
    push,
    run_elsewhere,
)
from tests.hub.repository import etag
from tests.hub.server import Answer
from tests.tiny import SIZE, VOCABULARY
from tests.vocabulary import write_vocabulary


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
    assert len(hub.repos[ID].commits) == 2  # the first commit created the repository
    np.testing.assert_array_equal(logits(load()), logits(load(str(made))))


@pytest.mark.parametrize("library", ["mlx_esm_hf", "transformers"])
def test_load_elsewhere(hub, sharded, tmp_path, library):
    push(sharded, private=True)
    refused = run_elsewhere(hub, tmp_path / "home", ELSEWHERE, library, ID)
    assert refused.returncode and "is not a local folder and is not a valid model identifier" in refused.stderr
    done = run_elsewhere(hub, tmp_path / "home", ELSEWHERE, library, ID, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), logits(load(str(sharded))), atol=1e-4)


def test_push_of_a_model(hub, made):
    """The method takes the arguments of transformers' method."""
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
    """These are transformers' methods. Each adds its files, and the card of the first is kept."""
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


def test_branch(hub, made, sharded):
    push(made)
    push(sharded, revision="shards")
    assert "model.safetensors" in hub.repos[ID].files("main")
    assert "model.safetensors" not in hub.repos[ID].files("shards")  # it is stale on that branch only
    np.testing.assert_array_equal(logits(load(revision="shards")), logits(load()))


def test_pull_request(hub, made, sharded):
    """A user without write access may open a pull request, also with a branch."""
    push(made)
    before = hub.commit(ID, "main")
    done = push(sharded, token="hf_you", create_pr=True)
    assert done.commit.pr_url == f"{hub.endpoint}/{ID}/discussions/1"
    assert hub.commit(ID, "main") == before
    assert "model.safetensors" not in hub.repos[ID].files("refs/pr/1")
    again = push(sharded, token="hf_you", create_pr=True, revision="main")
    assert again.commit.pr_url == f"{hub.endpoint}/{ID}/discussions/2"
    push(made, revision="refs/pr/1")  # the owner pushes to the pull request
    assert "model.safetensors" in hub.repos[ID].files("refs/pr/1")


def test_private(hub, made):
    push(made, private=True)
    assert hub.repos[ID].private
    push(made, private=True)
    push(made, "me/open")
    commit = hub.commit("me/open", "main")
    with pytest.raises(ValueError, match="me/open already exists and is public. Nothing was sent"):
        push(made, "me/open", private=True)
    assert hub.commit("me/open", "main") == commit


def test_name_without_owner(hub, made):
    assert push(made, "esm").repo_id == ID


def sent(hub):
    """Return the bytes of large files that were sent since the last call."""
    total = sum(hub.sent.values())
    hub.sent.clear()
    return total


def test_second_push_sends_nothing(hub, sharded):
    push(sharded)
    assert sent(hub) == sum(file.stat().st_size for file in sharded.glob("*.safetensors"))
    commit = hub.commit(ID, "main")
    done = push(sharded)
    assert (sent(hub), hub.commit(ID, "main"), done.commit.oid) == (0, commit, commit)


def test_stale_weights_are_deleted_in_the_same_commit(hub, made, sharded, tmp_path):
    """Exactly the weights that would be loaded instead, or that no index lists any more, are deleted."""
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


@pytest.mark.parametrize(
    ("request_", "kind", "times", "message"),
    [
        ("POST .*/preupload/", 401, 1, "answered 401 .*the token is missing or not valid: log in"),
        ("POST .*/preupload/", 403, 1, "answered 403 .*the token does not allow this"),
        ("POST .*/preupload/", 429, 9, "answered 429 .*too many requests: wait a few minutes"),
        ("POST .*objects/batch", 500, 9, "answered 500 .*the server has a problem: try again later"),
        ("PUT /cdn/", 500, 99, "answered 500 .*the server has a problem: try again later"),
        ("PUT /cdn/", "cut", 99, "the connection to .* failed .*Try again: complete files are kept"),
        ("PUT /cdn/", "corrupt", 99, "answered 400 .The uploaded file is not the one that was announced"),
        ("POST /lfs/verify", 500, 99, "answered 500"),
        ("POST .*/commit/", 500, 1, "answered 500 .*the server has a problem: try again later"),
        ("POST .*/commit/", "cut", 1, "the connection to .* failed"),
        ("POST .*/commit/", 412, 1, "answered 412 .*the repository has changed in the meantime: try again"),
    ],
)
def test_failures_do_not_change_the_repository(hub, made, sharded, tmp_path, request_, kind, times, message):
    """The message is one sentence, the repository is unchanged, and the next push sends the rest."""
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
def test_short_failures_are_retried(hub, sharded, request_, kind):
    hub.fail(request_, kind, 2)
    push(sharded)
    np.testing.assert_array_equal(logits(load()), logits(load(str(sharded))))


def test_broken_upload_sends_only_the_rest(hub, sharded):
    """If one shard fails, the others are not sent again."""
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


def test_another_user_pushes_at_the_same_time(hub, made, sharded):
    """The commit is refused, so that two checkpoints are not mixed."""
    push(made)
    answer = hub.answer

    def push_before_commit(request):
        if "/commit/" in request.path:
            hub.repos[ID].commit(hub.repos[ID].files() | {"theirs": b""}, "Theirs")
        return answer(request)

    hub.answer = push_before_commit
    with pytest.raises(OSError, match="412 .*has changed in the meantime"):
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
    """A killed process does not change the repository, and files that were uploaded are not sent again."""
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


def test_permissions(hub, made):
    with pytest.raises(OSError, match="401 .Invalid username or password.*log in"):
        push(made, token=False)
    with pytest.raises(OSError, match="403 .You don't have the rights to create a model under the namespace .you.*"):
        push(made, "you/esm")
    push(made, "you/esm", token="hf_you")
    with pytest.raises(OSError, match="403 .*you do not have write access"):
        push(made, "you/esm")
    push(made, "you/hidden", token="hf_you", private=True)
    with pytest.raises(OSError, match="403 .You don't have the rights"):  # the Hub does not say that it exists
        push(made, "you/hidden", create_pr=True)
    with pytest.raises(OSError, match="has no branch, tag or commit 'refs/pr/7'"):
        push(made, "you/esm", token="hf_you", revision="refs/pr/7")


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


def test_torch_loads_a_published_model(hub, sharded):
    push(sharded)
    model = transformers.AutoModelForMaskedLM.from_pretrained(ID)
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.tensor(IDS)).logits.numpy(), logits(load()), atol=1e-4)
