"""The trainer beside transformers' Trainer and torch: the same weights and batches give the same losses."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten

import mlx_esm_hf
from mlx_esm_hf import MLXEsmConfig, MLXEsmForMaskedLM
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.order import epoch_of
from mlx_esm_hf.training.trainer import LOG, MLXTrainer
from tests.processes import ENVIRONMENT, ON_TWO_RANKS, ROOT
from tests.tiny import tiny

OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class InOrder:
    """Rows as a data set that no trainer shuffles."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return self.rows[number]

    def order(self, seed, epoch):
        return np.arange(len(self.rows))


def masked_rows(count, seed=0):
    """Rows of several lengths, in which the masked residue is the one behind it: something can be learned."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        ids = np.repeat(rng.integers(4, 24, rng.integers(3, 15)), 2)
        labels = np.where(rng.random(len(ids)) < 0.3, ids, -100)
        inputs = np.where(labels > 0, 32, ids)
        rows.append({"input_ids": [0, *inputs.tolist(), 2], "labels": [-100, *labels.tolist(), -100]})
    return rows


def classified_rows(count, seed=0):
    """Rows whose class is whether they have more residues of one half of the alphabet; beside a column of text."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        ids = rng.integers(4, 24, rng.integers(5, 25))
        rows.append({"input_ids": [0, *ids.tolist(), 2], "label": int((ids < 14).mean() > 0.5), "name": "protein"})
    return rows


def padded(rows):
    return dict(transformers.DataCollatorForTokenClassification(esm2_tokenizer(), return_tensors="np")(rows))


def twins(head, folder, **settings):
    """The same random model in MLX and in torch."""
    torch.manual_seed(0)
    theirs = getattr(transformers, f"Esm{head}")(transformers.EsmConfig(**tiny("ESM-2", **OFF, **settings)))
    theirs.save_pretrained(folder / "initial")
    return getattr(mlx_esm_hf, f"MLXEsm{head}").from_pretrained(folder / "initial"), theirs


def losses_of(folder):
    lines = [json.loads(line) for line in (Path(folder) / LOG).read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_fifty_steps_of_a_masked_language_model_beside_torch(tmp_path):
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


@pytest.mark.parametrize("accumulation", [1, 2])
def test_classification_beside_transformers_trainer(accumulation, tmp_path):
    ours, theirs = twins("ForSequenceClassification", tmp_path, num_labels=2)
    tokenizer, train, evaluated = esm2_tokenizer(), classified_rows(96), classified_rows(20, seed=1)
    settings = {
        "num_train_epochs": 3, "learning_rate": 2e-3, "per_device_train_batch_size": 8, "warmup_ratio": 0.1,
        "gradient_accumulation_steps": accumulation, "weight_decay": 0.01, "logging_steps": 1,
        "eval_strategy": "epoch", "save_strategy": "no",
    }  # fmt: skip

    def accuracy(evaluated):
        return {"accuracy": float((evaluated.predictions.argmax(-1) == evaluated.label_ids).mean())}

    args = MLXTrainingArguments(tmp_path / "ours", **settings)
    trainer = MLXTrainer(
        ours, args, train_dataset=InOrder(train), eval_dataset=evaluated, processing_class=tokenizer,
        compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train()

    settings["warmup_steps"] = settings.pop("warmup_ratio")
    theirs_args = transformers.TrainingArguments(
        tmp_path / "theirs", **settings, use_cpu=True, report_to="none", disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    twin = transformers.Trainer(
        theirs, theirs_args, train_dataset=train, eval_dataset=evaluated, processing_class=tokenizer,
        compute_metrics=accuracy,
    )  # fmt: skip
    twin.train()

    def column(log, name):
        return [line[name] for line in log if name in line]

    for name, bar in (("loss", 1e-3), ("eval_loss", 1e-3), ("learning_rate", 1e-9), ("eval_accuracy", 0)):
        found, expected = column(trainer.state.log_history, name), column(twin.state.log_history, name)
        assert len(found) == len(expected) > 0
        assert np.abs(np.subtract(found, expected)).max() <= bar, name
    predictions, expected = trainer.predict(evaluated), twin.predict(evaluated)
    assert np.abs(predictions.predictions - expected.predictions).max() < 1e-2
    assert np.array_equal(predictions.label_ids, expected.label_ids)
    assert predictions.metrics["test_accuracy"] == expected.metrics["test_accuracy"] > 0.6


def small_training(folder, **settings):
    mx.random.seed(0)
    model = MLXEsmForMaskedLM(MLXEsmConfig(**tiny("ESM-2", **settings.pop("config", OFF))))
    settings = {"max_steps": 24, "logging_steps": 1, "save_steps": 4, "learning_rate": 1e-3, **settings}
    args = MLXTrainingArguments(folder, **settings)
    return MLXTrainer(model, args, padded, masked_rows(70), masked_rows(10, seed=1), esm2_tokenizer())


def test_one_step_does_not_depend_on_how_its_batch_is_cut(tmp_path):
    expected = small_training(tmp_path / "a", per_device_train_batch_size=16)
    expected.train()
    cut = small_training(tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=4)
    cut.train()
    assert np.abs(np.subtract(losses_of(tmp_path / "a"), losses_of(tmp_path / "b"))).max() < 1e-5


# Goes on with a training, and kills itself some time after a step, if one is named.
CHILD = """
import os, signal, sys, threading, time
from pathlib import Path
from tests.training.test_trainer import small_training
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
"""


def killed_and_resumed(folder, kills, rng):
    """Run the training in processes of their own, each killed at a random moment, then in one that ends."""
    for step in [*sorted(rng.sample(range(1, 20), kills)), 0]:
        command = [sys.executable, "-c", CHILD, str(folder), str(step), str(rng.random() * 0.03)]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT)
        assert done.returncode == (-signal.SIGKILL if step else 0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    small_training(folder, config={}, save_total_limit=2, batch_tokens=200).train()  # with dropout
    return folder


def assert_same_training(folder, expected):
    assert losses_of(folder) == losses_of(expected)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in expected.iterdir())
    for name in ("model.safetensors", "training.safetensors"):
        found, wanted = (mx.load(str(path / "checkpoint-24" / name)) for path in (folder, expected))
        assert found.keys() == wanted.keys()
        assert all(mx.array_equal(found[key], wanted[key]) for key in wanted)


def test_killed_three_times_it_ends_with_the_same_losses_and_weights(undisturbed, tmp_path):
    killed_and_resumed(tmp_path / "out", 3, random.Random(0))
    assert_same_training(tmp_path / "out", undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("turn", range(5))
def test_killed_twenty_times(turn, undisturbed, tmp_path):
    """Four kills a turn."""
    killed_and_resumed(tmp_path / "out", 4, random.Random(turn))
    assert_same_training(tmp_path / "out", undisturbed)


RANKS = """
import sys
from tests.training.test_trainer import small_training
trainer = small_training(sys.argv[1], per_device_train_batch_size=4, eval_strategy="steps", eval_steps=8)
trainer.train()
"""


def test_two_ranks_are_one(tmp_path):
    """70 rows in batches of 4: in the last step of an epoch the second rank has fewer rows than the first."""
    small_training(
        tmp_path / "one", per_device_train_batch_size=4, gradient_accumulation_steps=2, eval_strategy="steps",
        eval_steps=8,
    ).train()  # fmt: skip
    command = [*ON_TWO_RANKS, sys.executable, "-c", RANKS, tmp_path / "two"]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(one) == len(two) == 24
    assert np.abs(np.subtract(one, two)).max() < 1e-5
    logs = [[json.loads(line) for line in (tmp_path / name / LOG).read_text().splitlines()] for name in ("one", "two")]
    evals = [[line["eval_loss"] for line in log if "eval_loss" in line] for log in logs]
    assert len(evals[0]) == 3
    assert np.abs(np.subtract(*evals)).max() < 1e-5


def test_a_loss_that_is_no_number_names_the_items(tmp_path):
    trainer, bad = small_training(tmp_path), 31  # <null_1>, which no other item has
    item = epoch_of(70, trainer.args.seed, 0)[6 * 8]
    trainer.train_dataset[item]["input_ids"][1] = bad
    trainer.compute_loss = lambda model, inputs: (
        model(**inputs).loss * mx.where((inputs["input_ids"] == bad).any(), mx.nan, 1)
    )
    with pytest.raises(FloatingPointError, match=rf"Step 7: the loss is nan.*has the items \[{item}, "):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    weights = trainer.model.from_pretrained(tmp_path / "checkpoint-4").parameters()
    assert all(mx.isfinite(x).all() for _, x in tree_flatten(weights))


def test_the_best_checkpoint_is_kept_and_taken(tmp_path):
    trainer = small_training(
        tmp_path, eval_strategy="steps", eval_steps=4, save_total_limit=2, load_best_model_at_end=True,
        metric_for_best_model="wish", greater_is_better=True,
    )  # fmt: skip
    wishes = iter([1, 5, 2, 3, 4, 0])
    trainer.compute_metrics = lambda _: {"wish": next(wishes)}
    trainer.train()
    assert trainer.state.best_model_checkpoint == "checkpoint-8"
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-24", "checkpoint-8"]
    best = trainer.model.from_pretrained(tmp_path / "checkpoint-8")
    for name, value in tree_flatten(best.parameters()):
        assert mx.array_equal(value, dict(tree_flatten(trainer.model.parameters()))[name]), name


def test_what_goes_on_from_another_training_is_refused(tmp_path):
    small_training(tmp_path, max_steps=4).train()
    with pytest.raises(ValueError, match="learning_rate: 0.001 there, 0.002 here"):
        small_training(tmp_path, max_steps=4, learning_rate=2e-3).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        small_training(tmp_path / "empty").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="not a checkpoint that a training can go on from"):
        small_training(tmp_path).train(resume_from_checkpoint=tmp_path)


def test_a_checkpoint_is_a_model_for_torch_too(tmp_path):
    trainer = small_training(tmp_path, max_steps=4)
    trainer.train()
    theirs = transformers.EsmForMaskedLM.from_pretrained(tmp_path / "checkpoint-4").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint-4")
    inputs = tokenizer("MKTAYIAKQR", return_tensors="pt")
    ours = np.array(trainer.model(**inputs).logits)
    assert np.abs(ours - theirs(**inputs).logits.detach().numpy()).max() < 1e-5


def test_bfloat16_trains_float32_weights(tmp_path):
    trainer = small_training(tmp_path, bf16=True)
    trainer.train()
    expected = small_training(tmp_path / "float32")
    expected.train()
    assert trainer.model.dtype == mx.float32
    found, wanted = losses_of(tmp_path), losses_of(tmp_path / "float32")
    assert found != wanted
    assert np.abs(np.subtract(found, wanted)).max() < 0.05


def test_weight_decay_leaves_alone_what_no_loss_reaches(tmp_path):
    trainer = small_training(tmp_path, weight_decay=0.5)
    before = np.array(trainer.model.esm.contact_head.regression.weight)
    trainer.train()
    assert np.array_equal(np.array(trainer.model.esm.contact_head.regression.weight), before)


def test_nothing_to_train_is_said(tmp_path):
    trainer = small_training(tmp_path)
    trainer.model.freeze()
    with pytest.raises(ValueError, match="All parameters are frozen"):
        trainer.train()
    with pytest.raises(ValueError, match="give MLXTrainer a train_dataset"):
        MLXTrainer(trainer.model, MLXTrainingArguments(tmp_path)).train()
    rows = [{"input_ids": [0, 5, 6, 2]}] * 4
    with pytest.raises(ValueError, match="It needs labels"):
        MLXTrainer(trainer.model.unfreeze(), MLXTrainingArguments(tmp_path), None, rows).train()
