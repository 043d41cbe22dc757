"""What `MLXTrainer` promises beyond single arguments: order of data, the best checkpoint, and losses of the user."""

import collections

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
import transformers

from mlx_esm_hf import MLXEsmConfig, MLXEsmForMaskedLM, ops
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.optimizer import is_decayed
from mlx_esm_hf.training.trainer import MLXTrainer
from tests.tiny import tiny
from tests.training.test_trainer_of_scripts import classified_rows, losses, training
from tests.training.trainings import OFF, twins

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}


class Scored(MLXTrainer):
    """Evaluations have the losses of a list."""

    scores: list[float]

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_loss"] = self.scores[self.state.global_step - 1]
        return output


def test_the_best_checkpoint_is_the_best_of_those_written(tmp_path):
    """An evaluation between two checkpoints may be better than both."""
    settings = EVERY_STEP | {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    trainer = training(tmp_path, Scored, args=settings)
    trainer.scores = [0.1, 0.5, 0.2, 0.4, 0.8, 0.7]
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert trainer.state.best_metric == 0.1  # early stopping compares with every evaluation, as in transformers
    again = training(tmp_path, Scored, args=settings)
    again.scores = [0.0, 0.0, 0.2, 0.4, 0.8, 0.45]
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("settings", [{}, {"train_sampling_strategy": "group_by_length"}, {"batch_tokens": 60}])
def test_the_dataloader_of_the_trainer_has_the_order_of_a_training(tmp_path, settings):
    """A subclass may change the batches that `super().get_train_dataloader()` returns."""

    class Wrapped(MLXTrainer):
        def get_train_dataloader(self):
            return list(super().get_train_dataloader())

    settings = {"max_steps": -1, "num_train_epochs": 2} | settings
    usual, wrapped = training(tmp_path, args=settings), training(tmp_path, Wrapped, args=settings)
    usual.train(), wrapped.train()
    assert losses(wrapped) == losses(usual)
    assert losses(wrapped, "epoch") == losses(usual, "epoch")


def test_random_dataloaders_and_samplers_resume(tmp_path):
    """They draw from the random numbers of torch and NumPy."""

    class Loader(MLXTrainer):
        def get_train_dataloader(self):
            rows = [{name: row[name] for name in ("input_ids", "label")} for row in self.train_dataset]
            return torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=self.data_collator)

    class Sampler(MLXTrainer):
        def _get_train_sampler(self, train_dataset):
            return np.random.permutation(len(train_dataset))

    for number, cls in enumerate((Loader, Sampler)):
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}
        folder = tmp_path / str(number)
        whole, again = training(folder, cls, args=settings), training(folder, cls, args=settings)
        whole.train()
        torch.manual_seed(7), np.random.seed(7)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        assert losses(again) == losses(whole)


def test_random_masks_are_the_same_after_resuming(tmp_path):
    """Transformers' collator draws them from NumPy's random numbers."""
    collator = transformers.DataCollatorForLanguageModeling(esm2_tokenizer(), return_tensors="np")

    def run(resume=None):
        mx.random.seed(0)
        model = MLXEsmForMaskedLM(MLXEsmConfig(**tiny("ESM-2", **OFF)))
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        rows = [{"input_ids": row["input_ids"]} for row in classified_rows(16)]
        trainer = training(tmp_path, model=model, args=settings, train_dataset=rows, data_collator=collator)
        trainer.train(resume_from_checkpoint=resume)
        return losses(trainer)

    assert run() == run(str(tmp_path / "checkpoint-2"))


def test_the_epoch_is_logged(tmp_path):
    seen = []

    class Seen(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs["epoch"] == state.epoch)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(metrics["epoch"] == state.epoch)

    trainer = training(tmp_path, callbacks=[Seen], args=EVERY_STEP)
    trainer.train()
    assert len(seen) == 4 + 2 * 4 + 1 and all(seen)
    assert trainer.evaluate()["epoch"] == trainer.state.epoch


def test_events_within_a_step_are_those_of_transformers(tmp_path):
    counts = {"ours": collections.Counter(), "theirs": collections.Counter()}
    events = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")

    def recorder(place):
        def event(name):
            return lambda self, args, state, control, **kwargs: counts[place].update([(name, state.global_step)])

        return type("Recorder", (transformers.TrainerCallback,), {name: event(name) for name in events})

    _, theirs = twins("ForSequenceClassification", tmp_path, num_labels=2)
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    args = transformers.TrainingArguments(tmp_path / "t", use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    data = {"train_dataset": classified_rows(16), "processing_class": esm2_tokenizer()}
    transformers.Trainer(theirs, args, callbacks=[recorder("theirs")], **data).train()
    training(tmp_path / "o", callbacks=[recorder("ours")], args=settings).train()
    assert counts["ours"] == counts["theirs"]
    assert list(counts["ours"]) == list(counts["theirs"])  # in the same order


def test_two_callbacks_of_one_class_keep_their_states(tmp_path):
    def run(resume=None):
        stops = [transformers.EarlyStoppingCallback(patience) for patience in (9, 2)]
        settings = EVERY_STEP | {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
        settings |= {"load_best_model_at_end": True}
        trainer = training(tmp_path, Scored, args=settings, callbacks=stops)
        trainer.scores = [0.5, 0.6, 0.4, 0.5, 0.6, 0.7]
        trainer.train(resume_from_checkpoint=resume)
        return [stop.early_stopping_patience_counter for stop in stops], trainer.state.global_step

    assert run() == run(str(tmp_path / "checkpoint-4")) == ([2, 2], 5)


def test_a_loss_without_optional_arguments(tmp_path):
    class Bare(MLXTrainer):
        def compute_loss(self, model, inputs):
            return 2 * model(**inputs).loss

    rows = classified_rows(6, seed=1)
    usual, bare = training(tmp_path), training(tmp_path, Bare)
    assert bare.evaluate()["eval_loss"] == pytest.approx(2 * usual.evaluate()["eval_loss"], rel=1e-5)
    assert np.array_equal(bare.predict(rows).predictions, usual.predict(rows).predictions)
    bare.train()


def test_a_loss_of_the_user_is_not_compiled(tmp_path, monkeypatch):
    """A compiled loss would keep the numbers of the first step. The GPU's choice to compile is made here on a CPU."""
    monkeypatch.setattr(ops, "compiled", lambda function, state: mx.compile(function, inputs=state, outputs=state))

    class Annealed(MLXTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = model(**inputs).loss * 0 + self.state.global_step
            return (loss, None) if return_outputs else loss

    def annealed(outputs, labels, num_items_in_batch=None):
        return nn.losses.cross_entropy(outputs.logits, labels).mean() * 0 + given.state.global_step

    trainer, given = training(tmp_path, Annealed), training(tmp_path, compute_loss_func=annealed)
    trainer.train(), given.train()
    assert losses(trainer) == losses(given) == [0, 1, 2, 3]


def test_evaluations_are_checked_before_the_training(tmp_path):
    best = EVERY_STEP | {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    for options, message in (
        ({"args": EVERY_STEP, "eval_dataset": None}, "give MLXTrainer an eval_dataset"),
        ({"args": best, "eval_dataset": {"a": classified_rows(3)}}, "eval_a_loss"),
        ({"args": best | {"metric_for_best_model": "eval_b_f1"}, "eval_dataset": {"a": classified_rows(3)}}, "eval_a_"),
    ):
        trainer = training(tmp_path, **options)
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0


def test_text_in_a_batch_is_named(tmp_path):
    class Loader(MLXTrainer):
        def get_train_dataloader(self):
            return [{"input_ids": np.ones((2, 3), int), "labels": [0, 1], "name": ["one", "two"]}]

    with pytest.raises(ValueError, match="column 'name' of a batch"):
        training(tmp_path, Loader).train()


def test_methods_and_arguments_that_scripts_use(tmp_path):
    given = (optim.SGD, {"learning_rate": 0.25})
    trainer = training(tmp_path, optimizer_cls_and_kwargs=given, args=EVERY_STEP | {"lr_scheduler_type": "constant"})
    trainer.train(ignore_keys_for_eval=["hidden_states"])
    assert losses(trainer, "learning_rate") == [0.25] * 4 and trainer.get_learning_rates() == [0.25]
    names = trainer.get_decay_parameter_names(trainer.model)
    assert "classifier.dense.weight" in names and all(map(is_decayed, names)) and not any("bias" in n for n in names)
    assert trainer.num_examples(trainer.get_train_dataloader()) == len(trainer.train_dataset)
    assert trainer.num_examples(trainer.get_eval_dataloader()) == len(trainer.eval_dataset)
    with pytest.raises(AttributeError, match="hyperparameter_search.*train with each"):
        trainer.hyperparameter_search()
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        trainer.unknown  # noqa: B018
