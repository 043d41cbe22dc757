"""The training loop: its losses are those of torch, however steps are divided into batches and ranks."""

import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.datasets import shuffled_items
from mlx_esm_hf.training.evaluator import LOG
from mlx_esm_hf.training.loop import label_count
from mlx_esm_hf.training.trainer import MLXTrainer
from tests.processes import ENVIRONMENT, ON_TWO_RANKS, ROOT
from tests.training.trainings import InOrder, losses_of, masked_rows, padded, small_training, twins


def test_fifty_steps_of_a_masked_language_model_compared_with_torch(tmp_path):
    ours, theirs = twins("ForMaskedLM", tmp_path)
    rows = masked_rows(400)
    args = MLXTrainingArguments(
        tmp_path / "out", max_steps=50, learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.1,
        logging_steps=1, save_strategy="no",
    )  # fmt: skip
    MLXTrainer(ours, args, padded, InOrder(rows)).train()

    decayed = {name for name, _ in theirs.named_parameters() if not any(x in name.lower() for x in ("bias", "norm"))}
    groups = [
        {"params": [p for n, p in theirs.named_parameters() if n in decayed], "weight_decay": 0.1},
        {"params": [p for n, p in theirs.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer, expected = torch.optim.AdamW(groups, lr=1e-3), []
    for step in range(50):
        inputs = {name: torch.tensor(x) for name, x in padded(rows[8 * step : 8 * step + 8]).items()}
        loss = theirs(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert np.abs(np.subtract(losses_of(tmp_path / "out"), expected)).max() < 1e-3
    assert np.mean(expected[-5:]) < np.mean(expected[:5]) - 0.3


def test_a_step_does_not_depend_on_its_division_into_batches(tmp_path):
    expected = small_training(tmp_path / "a", per_device_train_batch_size=16)
    expected.train()
    divided = small_training(tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=4)
    divided.train()
    assert np.abs(np.subtract(losses_of(tmp_path / "a"), losses_of(tmp_path / "b"))).max() < 1e-5


RANKS = """
import sys
from tests.training.test_loop import half_labelled
half_labelled(sys.argv[1]).train()
"""


def half_labelled(folder, **settings):
    """Return a training in which one of two ranks often has a batch without labels."""
    settings |= {"per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 8}
    trainer = small_training(folder, **settings)
    for index in shuffled_items(70, trainer.args.seed, 0).reshape(-1, 7)[:, ::2].ravel()[:48]:
        row = trainer.train_dataset[index]
        row["labels"] = [-100] * len(row["labels"])
    return trainer


def test_two_ranks_give_the_losses_of_one(tmp_path):
    """With 70 rows in batches of 4, rank 1 has fewer rows than rank 0 in the last step of an epoch."""
    half_labelled(tmp_path / "one", gradient_accumulation_steps=2).train()
    command = [*ON_TWO_RANKS, sys.executable, "-c", RANKS, tmp_path / "two"]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(one) == len(two) == 24
    assert np.abs(np.subtract(one, two)).max() < 1e-5
    logs = [[json.loads(line) for line in (tmp_path / name / LOG).read_text().splitlines()] for name in ("one", "two")]
    evals = [[line["eval_loss"] for line in log if "eval_loss" in line] for log in logs]
    assert len(evals[0]) == 3
    assert np.abs(np.subtract(*evals)).max() < 1e-5


def test_the_error_of_a_nan_loss_names_the_items(tmp_path):
    trainer, bad = small_training(tmp_path), 31  # <null_1>, which no other item contains
    item = shuffled_items(70, trainer.args.seed, 0)[6 * 8]
    trainer.train_dataset[item]["input_ids"][1] = bad
    trainer.compute_loss = lambda model, inputs: (
        model(**inputs).loss * mx.where((inputs["input_ids"] == bad).any(), mx.nan, 1)
    )
    with pytest.raises(FloatingPointError, match=rf"Step 7: the loss is nan.*contain items \[{item}, "):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    weights = trainer.model.from_pretrained(tmp_path / "checkpoint-4").parameters()
    assert all(mx.isfinite(x).all() for _, x in tree_flatten(weights))


def test_bfloat16_trains_float32_weights(tmp_path):
    trainer = small_training(tmp_path, bf16=True)
    trainer.train()
    expected = small_training(tmp_path / "float32")
    expected.train()
    assert trainer.model.dtype == mx.float32
    found, wanted = losses_of(tmp_path), losses_of(tmp_path / "float32")
    assert found != wanted
    assert np.abs(np.subtract(found, wanted)).max() < 0.05


def unlabelled(rows):
    return [{**row, "labels": [-100] * len(row["labels"])} for row in rows]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_batch_without_labels_contributes_nothing(bf16, tmp_path):
    """Its mean loss is NaN, and 0 · NaN would be NaN."""
    rows, losses = masked_rows(32), []
    for name, data in (("with", [*rows[:8], *unlabelled(rows[8:16])] * 2), ("without", rows[:8] * 2)):
        trainer = small_training(
            tmp_path / name, max_steps=2, save_strategy="no", bf16=bf16, gradient_accumulation_steps=len(data) // 16
        )
        trainer.train_dataset = InOrder(data)
        trainer.train()
        losses.append(losses_of(tmp_path / name))
    assert losses[0] == losses[1] and np.isfinite(losses[0]).all()


def test_a_step_without_labels_counts_and_has_no_gradient(tmp_path):
    rows = masked_rows(16)
    trainer = small_training(tmp_path, max_steps=2, save_strategy="no", lr_scheduler_type="constant")
    trainer.train_dataset = InOrder([*unlabelled(rows[:8]), *rows[8:]])
    trainer.train()
    first, second = [line for line in trainer.state.log_history if "loss" in line]
    assert (first["loss"], first["grad_norm"], first["step"]) == (0, 0, 1)
    assert second["loss"] > 1 and second["grad_norm"] > 0


def test_every_number_is_a_label_of_a_regression():
    assert label_count({"labels": np.array([-100.0, 1.0])}) == 2
    assert label_count({"labels": np.array([[-100, 5], [-100, -100]])}) == 1
    assert label_count({"input_ids": np.zeros((3, 7))}) == 3


def test_an_epoch_without_items_is_an_error(tmp_path):
    trainer = small_training(tmp_path, max_steps=2)
    trainer.train_dataset = InOrder(masked_rows(4))
    trainer.train_dataset.order = lambda seed, epoch: np.empty(0, np.int64)
    with pytest.raises(ValueError, match="Epoch 0 of the training data has no items"):
        trainer.train()
