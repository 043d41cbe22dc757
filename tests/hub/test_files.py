"""Which files of a folder are published."""

import shutil

import pytest

from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.hub.files import read_checkpoint
from tests.hub.publishing import ID, load, names, push


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
    assert "not part of a checkpoint" in done.left_out["notes.txt"] == done.left_out["optimizer.safetensors"]
    assert "weights that are not loaded" in done.left_out["pytorch_model.bin"]
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
    yield "no config", spoil("config.json", lambda x: None), "contains no config.json: it is not a checkpoint"
    yield "no JSON", spoil("config.json", lambda x: x[:20]), "config.json is not JSON"
    yield "no model_type", spoil("config.json", lambda x: b"{}"), "has no model_type"
    yield "no shard", spoil(SHARD, lambda x: None), f"lacks {SHARD}, which model.safetensors.index.json lists"
    yield "cut shard", spoil(SHARD, lambda x: x[:-7]), f"{SHARD} is not a complete safetensors file"
    yield "pointer", spoil(SHARD, lambda x: POINTER), "It is a Git LFS pointer, not the weights"
    yield "index", spoil("model.safetensors.index.json", lambda x: x[:-9]), "is not the index of a sharded checkpoint"
    yield "no index", spoil("model.safetensors.index.json", lambda x: None), "contains no weights"


@pytest.mark.parametrize(("spoiler", "message"), [pytest.param(s, m, id=name) for name, s, m in spoilers()])
def test_incomplete_checkpoint(hub, made, tmp_path, spoiler, message):
    """It is refused before anything is sent."""
    model = load(str(made))
    model.save_pretrained(tmp_path / "three", max_shard_size="40KB")
    assert SHARD in names(tmp_path / "three")
    spoiler(tmp_path / "three")
    with pytest.raises(CheckpointError, match=message):
        push(tmp_path / "three")
    assert not hub.requests


def test_swapped_shards(hub, made, tmp_path):
    load(str(made)).save_pretrained(tmp_path / "three", max_shard_size="40KB")
    shutil.copy(tmp_path / "three" / "model-00001-of-00003.safetensors", tmp_path / "three" / SHARD)
    with pytest.raises(CheckpointError, match=f"{SHARD} lacks 'esm.* which the index lists"):
        push(tmp_path / "three")
    assert not hub.requests


def test_parameters(made, sharded):
    assert read_checkpoint(made).parameters == read_checkpoint(sharded).parameters > 10_000
