"""`MLXTrainer` compared with transformers' Trainer: the same weights and batches give the same losses."""

import math

import mlx.nn as nn
import numpy as np
import pytest
import transformers

from mlx_esm_hf import LoraConfig, MLXEsmConfig, MLXEsmForSequenceClassification, add_adapters
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.trainer import MLXTrainer
from tests.tiny import tiny
from tests.training.trainings import InOrder, classified_rows, small_training, twins


@pytest.mark.parametrize("accumulation", [1, 2])
def test_classification_compared_with_transformers_trainer(accumulation, tmp_path):
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


def test_weight_decay_does_not_change_parameters_without_a_gradient(tmp_path):
    trainer = small_training(tmp_path, weight_decay=0.5)
    before = np.array(trainer.model.esm.contact_head.regression.weight)
    trainer.train()
    assert np.array_equal(np.array(trainer.model.esm.contact_head.regression.weight), before)


def test_missing_data_parameters_or_labels_are_errors(tmp_path):
    trainer = small_training(tmp_path)
    trainer.model.freeze()
    with pytest.raises(ValueError, match="All parameters are frozen"):
        trainer.train()
    with pytest.raises(ValueError, match="give MLXTrainer a train_dataset"):
        MLXTrainer(trainer.model, MLXTrainingArguments(tmp_path)).train()
    rows = [{"input_ids": [0, 5, 6, 2]}] * 4
    with pytest.raises(ValueError, match="It needs labels"):
        MLXTrainer(trainer.model.unfreeze(), MLXTrainingArguments(tmp_path), None, rows).train()


def test_evaluation_leaves_out_batches_without_labels(tmp_path):
    trainer = small_training(tmp_path, per_device_eval_batch_size=4)
    expected = trainer.evaluate(trainer.eval_dataset[:4])["eval_loss"]
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in trainer.eval_dataset[4:8]]
    assert trainer.evaluate([*trainer.eval_dataset[:4], *rows])["eval_loss"] == expected
    assert "eval_loss" not in trainer.evaluate(rows)


def test_a_metric_that_is_nan_is_never_the_best(tmp_path):
    trainer = small_training(
        tmp_path, max_steps=12, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True,
        metric_for_best_model="score", save_total_limit=1,
    )  # fmt: skip
    scores = iter([math.nan, 2.0, 1.0])
    trainer.compute_metrics = lambda _: {"score": next(scores)}
    trainer.train()
    best = str(tmp_path / "checkpoint-8")
    assert (trainer.state.best_model_checkpoint, trainer.state.best_metric) == (best, 2.0)
    assert trainer.state.best_global_step == 8


def test_only_adapters_or_a_head_of_a_quantized_model_are_trained(tmp_path):
    def quantized():
        model = MLXEsmForSequenceClassification(MLXEsmConfig(**tiny("ESM-2", num_labels=2)))
        nn.quantize(model.esm, 32, 8, class_predicate=lambda name, m: "encoder" in name and isinstance(m, nn.Linear))
        args = MLXTrainingArguments(tmp_path, max_steps=1, save_strategy="no")
        return MLXTrainer(model, args, train_dataset=classified_rows(8), processing_class=esm2_tokenizer())

    with pytest.raises(ValueError, match=r"esm\.encoder.* is quantized and cannot be trained.*convert --dequantize"):
        quantized().train()
    head = quantized()
    head.model.base_model.freeze()
    head.train()
    adapters = quantized()
    add_adapters(adapters.model, LoraConfig(r=2, task_type="SEQ_CLS"))
    adapters.train()
