"""Which files of a folder are published."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import try_to_load_from_cache

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


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "vocab.txt", "config.json", "model.safetensors"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_links_that_leave_the_folder(hub, folder, tmp_path, name, dry_run):
    (tmp_path / "secret").write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../secret")
    with pytest.raises(CheckpointError, match=f"{name} is a link to {tmp_path}/secret, outside .* Nothing was sent"):
        push(folder, dry_run=dry_run)
    assert not hub.requests


def test_links_within_the_folder(hub, folder):
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "w")
    (folder / "model.safetensors").symlink_to("weights/w")
    (folder / "notes.txt").symlink_to("/etc/hostname")  # is not published
    done = push(folder)
    assert "a link to" in done.left_out["notes.txt"] and "/etc/hostname" in done.left_out["notes.txt"]
    assert hub.repos[ID].files()["model.safetensors"] == (folder / "weights" / "w").read_bytes()


def test_links_of_the_hub_cache(hub, folder):
    """A folder of the cache consists of links to files beside it."""
    push(folder)
    load()
    snapshot = Path(try_to_load_from_cache(ID, "config.json")).parent
    assert (snapshot / "model.safetensors").is_symlink()
    push(snapshot, "me/copy")
    assert hub.repos["me/copy"].files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    (snapshot / "LICENSE").symlink_to(folder / "vocab.txt")
    with pytest.raises(CheckpointError, match="LICENSE is a link to .*vocab.txt, outside"):
        push(snapshot, "me/copy")


@pytest.mark.parametrize("content", [b"", b"backup"])
def test_stray_backup(hub, folder, content):
    """The error lists what would be published and what would not."""
    (folder / "model.backup.safetensors").write_bytes(content)
    (folder / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="model.backup.safetensors is not a complete safetensors") as error:
        push(folder)
    assert not hub.requests
    assert "the variant 'backup'" in str(error.value) and "Remove or rename it" in str(error.value)
    assert "To be uploaded: model.backup.safetensors, model.safetensors, config.json" in str(error.value)
    assert "Not to be uploaded: notes.txt (not part of a checkpoint)." in str(error.value)


def test_swapped_shards(hub, made, tmp_path):
    load(str(made)).save_pretrained(tmp_path / "three", max_shard_size="40KB")
    shutil.copy(tmp_path / "three" / "model-00001-of-00003.safetensors", tmp_path / "three" / SHARD)
    with pytest.raises(CheckpointError, match=f"{SHARD} lacks 'esm.* which the index lists"):
        push(tmp_path / "three")
    assert not hub.requests


def test_parameters(made, sharded):
    assert read_checkpoint(made).parameters == read_checkpoint(sharded).parameters > 10_000
