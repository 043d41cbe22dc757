import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_esm_hf
from tests.hub import Hub, environment, serve
from tests.jobs.models import write_model

ROOT = Path(mlx_esm_hf.__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("esm2"))


@pytest.fixture
def push(tmp_path):
    """Return a function that runs the command in its own process against a loopback Hub."""
    hub = Hub()

    def push(*arguments, token="hf_me"):
        command = [sys.executable, "-m", "mlx_esm_hf", "push", *map(str, arguments)]
        variables = environment(endpoint, tmp_path / "home", HF_TOKEN=token)
        return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)

    push.hub = hub
    with serve(hub) as endpoint:
        yield push


def test_dry_run_then_push(push, folder):
    (folder / "optimizer.bin").write_bytes(b"x")
    dry = push(folder, "me/esm", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in dry.stdout and "left out  optimizer.bin: not part of a" in dry.stdout
    assert "would be uploaded to me/esm. Nothing was uploaded." in dry.stdout and not push.hub.repos
    done = push(folder, "esm", "--message", "Mine", "--private", "--base-model", "facebook/esm2", "--license", "mit")
    assert done.returncode == 0, done.stderr
    repo = push.hub.repos["me/esm"]
    assert repo.private and repo.commits[repo.refs["main"]].message == "Mine"
    assert b"license: mit" in repo.files()["README.md"] and b"base_model: facebook/esm2" in repo.files()["README.md"]
    assert f"/me/esm/commit/{repo.refs['main']}" in done.stdout
    assert dry.stdout.splitlines()[0] == done.stdout.splitlines()[0]


def test_name_without_owner(push, folder):
    assert "would be uploaded to me/esm. Nothing was uploaded." in push(folder, "esm", "--dry-run").stdout
    refused = push(folder, "esm", "--dry-run", token="hf_wrong")
    assert refused.returncode == 1 and "log in (`hf auth login`)" in refused.stderr


@pytest.mark.parametrize("name", ["me/esm", "esm"])
def test_dry_run_without_a_network(folder, tmp_path, name):
    for variables in ({"HF_HUB_OFFLINE": "1"}, {}):  # nothing listens on the port
        env = environment("http://localhost:9", tmp_path / "home", **variables)
        command = [sys.executable, "-m", "mlx_esm_hf", "push", str(folder), name, "--dry-run"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "model.safetensors" in done.stdout and f"would be uploaded to {name}. Nothing was" in done.stdout
        assert f"unknown  what {name} contains" in done.stdout


def test_missing_tokenizer(push, folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / name)
    assert "missing  a tokenizer: add it with tokenizer.save_pretrained" in push(tmp_path, "me/esm").stdout
    assert "missing" not in push(folder, "me/esm").stdout
    assert "missing" not in push(tmp_path, "me/esm").stdout  # the repository has one


def test_branch_and_pull_request(push, folder):
    assert push(folder, "me/esm", "--branch", "next").returncode == 0
    assert set(push.hub.repos["me/esm"].files()) == {".gitattributes"}
    proposed = push(folder, "me/esm", "--create-pr")
    assert "/me/esm/discussions/1" in proposed.stdout
    assert "model.safetensors" in push.hub.repos["me/esm"].files("refs/pr/1")


def test_errors_have_no_traceback(push, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for done, said in (
        (push(tmp_path / "empty", "me/esm"), "contains no config.json: it is not a checkpoint. Nothing was sent."),
        (push(folder, "me/esm", token="hf_wrong"), "401 (Invalid username or password.): the token is missing or not"),
        (push(folder, "a/b/c"), "Repo id must"),
    ):
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert not push.hub.repos
