"""The output folder of a training, after kills at each stage of its end."""

import json

import pytest

from mlx_esm_hf.runtime.files import SAVED
from mlx_esm_hf.training.checkpoints import STATE
from mlx_esm_hf.training.run_folder import training_folder


@pytest.fixture
def folder(tmp_path):
    """A training with a checkpoint."""
    (tmp_path / "out" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-4" / STATE).write_text("{}")
    (tmp_path / "out" / "log.jsonl").touch()
    return tmp_path / "out"


def test_killed_before_the_model_counts(folder):
    """It resumes."""
    (folder / ".saving.0a1b2c3d.part").mkdir()
    (folder / ".saving.0a1b2c3d.part" / "config.json").touch()
    with training_folder(folder) as resumes:
        assert resumes


@pytest.mark.parametrize("config", ["config.json", "adapter_config.json"])
def test_killed_while_the_model_is_moved(config, folder):
    """It is finished: the files get their place."""
    names = [config, "model.safetensors", "vocab.txt"]
    (folder / SAVED).mkdir()
    for name in names[:2]:
        (folder / SAVED / name).touch()
    (folder / "vocab.txt").touch()
    (folder / SAVED / ".plan.json").write_text(json.dumps({"new": names, "stale": []}))
    with pytest.raises(ValueError, match="already contains a model"), training_folder(folder):
        pass
    assert {path.name for path in folder.iterdir()} == {*names, "checkpoint-4", "log.jsonl"}


def test_killed_while_a_checkpoint_is_replaced(folder):
    saved = folder / "checkpoint-4" / SAVED
    saved.mkdir()
    (folder / "checkpoint-4" / STATE).rename(saved / STATE)
    (saved / ".plan.json").write_text(json.dumps({"new": [STATE], "stale": ["[!.]*"]}))
    with training_folder(folder) as resumes:
        assert resumes
    assert [path.name for path in (folder / "checkpoint-4").iterdir()] == [STATE]


def test_killed_before_the_first_checkpoint(tmp_path):
    """It starts again, with a new log."""
    (tmp_path / "log.jsonl").write_text("old")
    (tmp_path / "data").mkdir()
    with training_folder(tmp_path) as resumes:
        assert not resumes and [path.name for path in tmp_path.iterdir()] == ["data"]


def test_another_folder(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="already exists and is not a training"), training_folder(tmp_path):
        pass
