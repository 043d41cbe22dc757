"""Checkpoints: a training that was killed resumes to identical results."""

import random
import signal
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
import transformers
from mlx.utils import tree_flatten

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
    assert trainer.state.best_model_checkpoint == "checkpoint-8"
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-24", "checkpoint-8"]
    best = trainer.model.from_pretrained(tmp_path / "checkpoint-8")
    for name, value in tree_flatten(best.parameters()):
        assert mx.array_equal(value, dict(tree_flatten(trainer.model.parameters()))[name]), name


def test_resuming_with_other_settings_is_refused(tmp_path):
    small_training(tmp_path, max_steps=4).train()
    with pytest.raises(ValueError, match="learning_rate: 0.001 there, 0.002 here"):
        small_training(tmp_path, max_steps=4, learning_rate=2e-3).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="No checkpoint found"):
        small_training(tmp_path / "empty").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="not a training checkpoint to resume from"):
        small_training(tmp_path).train(resume_from_checkpoint=tmp_path)


def test_torch_loads_a_checkpoint(tmp_path):
    trainer = small_training(tmp_path, max_steps=4)
    trainer.train()
    theirs = transformers.EsmForMaskedLM.from_pretrained(tmp_path / "checkpoint-4").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint-4")
    inputs = tokenizer("MKTAYIAKQR", return_tensors="pt")
    ours = np.array(trainer.model(**inputs).logits)
    assert np.abs(ours - theirs(**inputs).logits.detach().numpy()).max() < 1e-5
