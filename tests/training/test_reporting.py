"""`report_to`: the log reaches trackers through transformers' callbacks."""

import json
import struct

import pytest

from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.evaluator import LOG
from mlx_esm_hf.training.reporting import TRACKERS, is_installed
from tests.training.trainings import small_training


def events_in(folder):
    """Yield the events in the file of TensorBoard in a folder, a sequence of lengths, checksums and messages."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.iterdir()
    with open(file, "rb") as stream:
        while header := stream.read(12):
            yield Event.FromString(stream.read(struct.unpack("<Q", header[:8])[0]))
            stream.read(4)


def test_tensorboard_receives_the_log(tmp_path):
    pytest.importorskip("tensorboardX")
    trainer = small_training(
        tmp_path / "out", max_steps=4, eval_strategy="steps", eval_steps=2, report_to=["tensorboard"],
        logging_dir=str(tmp_path / "events"),
    )  # fmt: skip
    trainer.train()
    events = [(event.step, value) for event in events_in(tmp_path / "events") for value in event.summary.value]
    lines = [json.loads(line) for line in (tmp_path / "out" / LOG).read_text().splitlines()]
    for tag, name in (("train/loss", "loss"), ("train/learning_rate", "learning_rate"), ("eval/loss", "eval_loss")):
        expected = {line["step"]: line[name] for line in lines if name in line}
        found = {step: value.simple_value for step, value in events if value.tag == tag}
        assert found == pytest.approx(expected, rel=1e-6), tag
        assert len(expected) == (2 if "eval" in tag else 4)
    assert "args/text_summary" in {value.tag for _, value in events}


def test_wandb_receives_the_log(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer = small_training(tmp_path / "out", max_steps=3, report_to="wandb", run_name="three steps")
    trainer.train()
    assert wandb.run.name == "three steps" and wandb.config["max_steps"] == 3
    assert wandb.run.summary["train/loss"] == trainer.state.log_history[-1]["loss"]
    wandb.finish()


def test_a_missing_tracker_is_reported_at_construction(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_esm_hf.training.reporting.find_spec", lambda name: None)
    for name, (_, package) in TRACKERS.items():
        with pytest.raises(ValueError, match=f"report_to='{name}' needs .*: pip install {package}"):
            small_training(tmp_path, report_to=name)


def test_trackers_are_a_list_of_names():
    assert MLXTrainingArguments("out").report_to == MLXTrainingArguments("out", report_to=None).report_to == []
    assert MLXTrainingArguments("out", report_to=["none"]).report_to == []
    assert MLXTrainingArguments("out", report_to="wandb").report_to == ["wandb"]
    assert MLXTrainingArguments("out", report_to="all").report_to == [name for name in TRACKERS if is_installed(name)]
