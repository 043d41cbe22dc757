"""Checkpoints: a training that was killed resumes to identical results."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
import transformers
from mlx.utils import tree_flatten

from mlx_esm_hf import LoraConfig, MLXTrainingArguments, add_adapters
from mlx_esm_hf.training.argument_groups import IgnoredArguments, OlderArguments, RefusedArguments
from mlx_esm_hf.training.checksums import write_checksums
from tests.processes import ENVIRONMENT, ROOT
from tests.training.trainings import losses_of, small_training

# Starts or resumes a training. If a step is given, the process kills itself some time after this step.
CHILD = """
import os, signal, sys, threading, time
from pathlib import Path
from tests.training.trainings import small_training
from mlx_esm_hf.training.checkpoints import checkpoints_in
folder, step, wait = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
trainer = small_training(folder, config={}, save_total_limit=2, batch_tokens=200)
def kill():
    while trainer.state.global_step < step:
        time.sleep(0.001)
    time.sleep(wait)
    os.kill(os.getpid(), signal.SIGKILL)
if step:
    threading.Thread(target=kill, daemon=True).start()
trainer.train(bool(checkpoints_in(folder)))
if step:
    time.sleep(60)  # on a fast machine the training may end before the kill
"""


def killed_and_resumed(folder, kills, rng):
    """Run the training in processes that are killed at random times, then in one that finishes."""
    for step in [*sorted(rng.sample(range(1, 20), kills)), 0]:
        command = [sys.executable, "-c", CHILD, str(folder), str(step), str(rng.random() * 0.03)]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT)
        assert done.returncode == (-signal.SIGKILL if step else 0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    small_training(folder, config={}, save_total_limit=2, batch_tokens=200).train()  # with dropout
    return folder


def assert_same_training(folder, expected):
    assert losses_of(folder) == losses_of(expected)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in expected.iterdir())
    for name in ("model.safetensors", "training.safetensors"):
        found, wanted = (mx.load(str(path / "checkpoint-24" / name)) for path in (folder, expected))
        assert found.keys() == wanted.keys()
        assert all(mx.array_equal(found[key], wanted[key]) for key in wanted)


def test_three_kills_do_not_change_losses_and_weights(uninterrupted, tmp_path):
    killed_and_resumed(tmp_path / "out", 3, random.Random(0))
    assert_same_training(tmp_path / "out", uninterrupted)


@pytest.mark.long
@pytest.mark.parametrize("turn", range(5))
def test_twenty_kills_do_not_change_losses_and_weights(turn, uninterrupted, tmp_path):
    """Each turn has four kills."""
    killed_and_resumed(tmp_path / "out", 4, random.Random(turn))
    assert_same_training(tmp_path / "out", uninterrupted)


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    trainer = small_training(
        tmp_path, eval_strategy="steps", eval_steps=4, save_total_limit=2, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    scores = iter([1, 5, 2, 3, 4, 0])
    trainer.compute_metrics = lambda _: {"score": next(scores)}
    trainer.train()
    assert trainer.state.best_name == "checkpoint-8"
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-24", "checkpoint-8"]
    best = trainer.model.from_pretrained(tmp_path / "checkpoint-8")
    trained = dict(tree_flatten(trainer.model.trainable_parameters()))  # all but the contact head, which is not saved
    for name, value in tree_flatten(best.parameters()):
        assert name not in trained or mx.array_equal(value, trained[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A training of four steps with a checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    small_training(folder, **SHORT).train()
    return folder


SHORT = {
    "max_steps": 4, "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}  # fmt: skip
# Each argument of a training that determines its result, with another value.
OTHERS = {
    "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "batch_tokens": 200,
    "gradient_accumulation_steps": 2, "max_steps": 5, "learning_rate": 2e-3, "lr_scheduler_type": "cosine",
    "warmup_steps": 2, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5, "gradient_checkpointing": True, "bf16": True, "eval_steps": 2, "save_steps": 8,
    "load_best_model_at_end": False, "metric_for_best_model": "accuracy", "greater_is_better": True, "seed": 1,
    "data_seed": 1, "label_smoothing_factor": 0.1, "dataloader_drop_last": True, "optim": "sgd", "eval_delay": 2,
    "train_sampling_strategy": "sequential", "lr_scheduler_kwargs": {}, "label_names": ["labels"],
    "remove_unused_columns": False,
}  # fmt: skip
# Arguments that may change: where and what is written, and what is shown.
FREE = {
    "output_dir", "save_total_limit", "logging_steps", "disable_tqdm", "report_to", "push_to_hub", "hub_model_id",
    "num_train_epochs", "warmup_ratio", "eval_strategy", "save_strategy", "activation_checkpointing", "fp16",
    "eval_on_start", "prediction_loss_only", "include_for_metrics", "save_only_model",
    "logging_strategy", "logging_first_step", "include_num_input_tokens_seen", "length_column_name", "run_name",
    "project", "trackio_space_id", "trackio_bucket_id", "logging_dir",
    "trackio_static_space_id", "hub_token", "hub_private_repo", "hub_revision", "hub_strategy",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_resuming_with_another_argument_is_refused(name, finished):
    trainer = small_training(finished, **SHORT | {name: OTHERS[name]})
    with pytest.raises(ValueError, match=rf"belongs to a training with other settings \(.*{name}: .*; now: "):
        trainer.train(resume_from_checkpoint=True)


def test_every_argument_is_compared_or_free():
    names = {field.name for field in dataclasses.fields(MLXTrainingArguments)}
    for group in (IgnoredArguments, RefusedArguments, OlderArguments):
        names -= {field.name for field in dataclasses.fields(group)}
    assert OTHERS.keys() | FREE | {"optim_args"} == names
    momentum = MLXTrainingArguments("out", optim="sgd", optim_args="momentum=0.9").settings()
    assert momentum["optim"] == "sgd" and momentum["optim_args"] == "momentum=0.9"
    epochs = MLXTrainingArguments("out", num_train_epochs=2).settings()
    assert epochs["num_train_epochs"] == 2 and epochs["max_steps"] is None


def test_what_may_change_may_change(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "moved")
    changed = {"logging_steps": 2, "save_total_limit": 1, "disable_tqdm": True}
    trainer = small_training(tmp_path / "moved", **SHORT | changed)
    trainer.train(resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=True)  # the same model, whose config its loss has completed


def changed_data(trainer):
    trainer.train_dataset[3]["labels"][1] = 7
    return "training data: other content"


def reordered_data(trainer):
    trainer.train_dataset.reverse()
    return "training data: other content"


def changed_validation(trainer):
    trainer.eval_dataset[3]["labels"][1] = 7
    return "validation data: other content"


def other_config(trainer):
    trainer.model.config.layer_norm_eps = 1e-6
    return "config.layer_norm_eps: 1e-05; now: 1e-06"


def other_job(trainer):
    trainer.settings = {"context": 64}
    return "context: not set; now: 64"


def frozen(trainer):
    trainer.model.lm_head.dense.freeze()
    return r"weights.lm_head.dense.bias is float32 of shape \(32,\) there, missing here"


def other_shape(trainer):
    trainer.model.lm_head.dense.weight = mx.zeros((32, 30))
    return r"weights.lm_head.dense.weight is float32 of shape \(32, 32\) there, float32 of shape \(32, 30\) here"


def adapters(trainer):
    add_adapters(trainer.model, LoraConfig(r=2))
    return "rank: not set; now: 2"


CHANGES = [
    changed_data, reordered_data, changed_validation, other_config, other_job, frozen, other_shape, adapters,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_resuming_with_other_data_or_another_model_is_refused(change, finished):
    trainer = small_training(finished, **SHORT)
    message = change(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)


def test_resuming_with_other_frozen_weights_is_refused(tmp_path):
    def training():
        trainer = small_training(tmp_path, max_steps=4)
        add_adapters(trainer.model, LoraConfig(r=2))
        return trainer

    training().train()
    training().train(resume_from_checkpoint=True)
    other = training()
    other.model.esm.embeddings.word_embeddings.weight += 1e-3
    with pytest.raises(ValueError, match="belongs to a training with other frozen parameters"):
        other.train(resume_from_checkpoint=True)
    other = small_training(tmp_path, max_steps=4)
    add_adapters(other.model, LoraConfig(r=4, lora_alpha=2))
    with pytest.raises(ValueError, match=r"\(rank: 2; now: 4, alpha: 8; now: 2\)"):
        other.train(resume_from_checkpoint=True)


def test_only_a_checkpoint_is_resumed(finished, tmp_path):
    with pytest.raises(ValueError, match="No checkpoint found"):
        small_training(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="not a training checkpoint to resume from"):
        small_training(tmp_path).train(resume_from_checkpoint=tmp_path)
    shutil.copytree(finished, tmp_path / "old")
    (tmp_path / "old" / "checkpoint-4" / "checksums.txt").unlink()
    with pytest.raises(ValueError, match="an earlier version wrote it. Remove .*checkpoint-4 to resume from the"):
        small_training(tmp_path / "old", **SHORT).train(resume_from_checkpoint=True)


FILES = [
    "model.safetensors", "config.json", "training.safetensors", "trainer_state.json", "tokenizer_config.json",
    "vocab.txt", "checksums.txt",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(name, damage, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    path = tmp_path / "out" / "checkpoint-4" / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        middle = len(data) // 2
        flipped = bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes(data[:middle] + (b"" if damage == "truncate" else flipped))
    with pytest.raises(ValueError, match=r"(not found|damaged).*Remove .*checkpoint-4 to resume from the") as error:
        small_training(tmp_path / "out", **SHORT).train(resume_from_checkpoint=True)
    assert str(path) in str(error.value) or name == "checksums.txt"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epoch_step", 1_000_000), ("epoch_step", -1), ("epoch_step", 0.5), ("epoch_step", "1"), ("epoch_step", None),
        ("global_step", 10**9), ("global_step", True), ("global_step", 10**400), ("epochs_done", 5), ("tokens", -1),
        ("epoch", float("nan")), ("total_loss", float("inf")), ("total_loss", 10**400), ("loss_since_log", "1"),
        ("log_history", {}), ("log_history", [1]), ("log_history", [{"loss": 1.0}]), ("best_metric", "good"),
        ("best_model_checkpoint", "../checkpoint-4"), ("best_model_checkpoint", "checkpoint-99"),
        ("best_model_checkpoint", 4), ("settings", []), ("settings", None), ("surprise", 1),
    ],
)  # fmt: skip
def test_an_impossible_state_is_an_error(name, value, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    folder = tmp_path / "out" / "checkpoint-4"
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps(state | {name: value}))
    (folder / "checksums.txt").unlink()
    write_checksums(folder)
    with pytest.raises(ValueError, match="checkpoint-99" if value == "checkpoint-99" else name):
        small_training(tmp_path / "out", **SHORT).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("text", ["[]", "null", "{", "", "[" * 100_000, "\x00"])
def test_a_state_that_is_no_object_is_an_error(text, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    folder = tmp_path / "out" / "checkpoint-4"
    (folder / "trainer_state.json").write_text(text)
    (folder / "checksums.txt").unlink()
    write_checksums(folder)
    with pytest.raises(ValueError, match="trainer_state.json is damaged"):
        small_training(tmp_path / "out", **SHORT).train(resume_from_checkpoint=True)


def without(arrays, name):
    del arrays[name]


DAMAGES = {
    "missing": lambda arrays: without(arrays, "weights.lm_head.bias"),
    "without optimizer": lambda arrays: without(arrays, "optimizer.step"),
    "without random state": lambda arrays: without(arrays, "random"),
    "additional": lambda arrays: arrays.update({"weights.lm_head.other": mx.zeros(3)}),
    "no tree": lambda arrays: arrays.update({"optimizer": mx.zeros(3)}),
    "shape": lambda arrays: arrays.update({"weights.lm_head.bias": mx.zeros(3)}),
    "dtype": lambda arrays: arrays.update({"optimizer.step": mx.array(4.0)}),
    "random state": lambda arrays: arrays.update({"random": mx.zeros(3, mx.uint32)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_arrays_are_an_error_that_names_them(damage, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    folder = tmp_path / "out" / "checkpoint-4"
    arrays = mx.load(str(folder / "training.safetensors"))
    mx.eval(arrays)
    DAMAGES[damage](arrays)
    mx.save_safetensors(str(folder / "training.safetensors"), arrays)
    (folder / "checksums.txt").unlink()
    write_checksums(folder)
    with pytest.raises(ValueError, match=r"(weights|optimizer|random).* is .* there, .* here\. Resume with the model"):
        small_training(tmp_path / "out", **SHORT).train(resume_from_checkpoint=True)


def test_torch_loads_a_checkpoint(tmp_path):
    trainer = small_training(tmp_path, max_steps=4)
    trainer.train()
    theirs = transformers.EsmForMaskedLM.from_pretrained(tmp_path / "checkpoint-4").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint-4")
    inputs = tokenizer("MKTAYIAKQR", return_tensors="pt")
    ours = np.array(trainer.model(**inputs).logits)
    assert np.abs(ours - theirs(**inputs).logits.detach().numpy()).max() < 1e-5
