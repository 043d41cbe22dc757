"""What public scripts pass to a Trainer and override in it."""

import json
import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from mlx.utils import tree_flatten

from mlx_esm_hf import MLXEsmConfig, MLXEsmForSequenceClassification, MLXEsmModel
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.adapters import LoraConfig, add_adapters
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.optimizer import AdamW
from mlx_esm_hf.training.trainer import NOT_CALLED, MLXTrainer
from tests.tiny import tiny
from tests.training.trainings import OFF, classified_rows, small_training, twins


def classifier():
    mx.random.seed(0)
    return MLXEsmForSequenceClassification(MLXEsmConfig(**tiny("ESM-2", num_labels=2, **OFF)))


def training(folder, cls=MLXTrainer, model=None, args=None, **options):
    settings = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3} | (args or {})
    data = {"train_dataset": classified_rows(16), "eval_dataset": classified_rows(6, seed=1)} | options
    data.setdefault("processing_class", esm2_tokenizer())
    if "model_init" not in data:
        data["model"] = model or classifier()
    return cls(args=MLXTrainingArguments(folder, **settings), **data)


def losses(trainer, name="loss"):
    return [line[name] for line in trainer.state.log_history if name in line]


# Losses


class Weighted(MLXTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weights = mx.array([1.0, 5.0])[labels]
        loss = (nn.losses.cross_entropy(outputs.logits, labels) * weights).mean()
        return (loss, outputs) if return_outputs else loss


def test_evaluation_uses_an_overridden_loss(tmp_path):
    rows = classified_rows(12)
    settings = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 12}
    trainer = training(tmp_path, Weighted, args=settings, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses(trainer)[0], rel=1e-5)
    plain = training(tmp_path, args=settings, train_dataset=rows, eval_dataset=rows).evaluate()["eval_loss"]
    assert abs(plain - losses(trainer)[0]) > 0.1
    assert trainer.predict(rows).predictions.shape == (12, 2)


def test_a_batch_without_labels_trains_and_is_evaluated(tmp_path):
    """A collator that returns `target`, and a loss that uses it."""

    class Targets(MLXTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            target = inputs.pop("target")
            outputs = model(**inputs)
            loss = nn.losses.cross_entropy(outputs.logits, target).mean()
            return (loss, outputs) if return_outputs else loss

    def collate(rows):
        batch = esm2_tokenizer().pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="np")
        return {**batch, "target": np.array([row["label"] for row in rows])}

    trainer = training(tmp_path, Targets, data_collator=collate)
    before = dict(tree_flatten(trainer.model.parameters()))
    trainer.train()
    assert all(loss > 0.1 for loss in losses(trainer))
    after = dict(tree_flatten(trainer.model.parameters()))
    assert not mx.array_equal(before["classifier.dense.weight"], after["classifier.dense.weight"])
    usual = training(tmp_path)
    usual.train()
    assert np.allclose(losses(trainer), losses(usual), rtol=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(usual.evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("own_batches", [False, True])
@pytest.mark.parametrize("problem_type", ["regression", None])
@pytest.mark.parametrize("size", [1, 4])
def test_integer_labels_of_a_regression_count(tmp_path, size, problem_type, own_batches):
    """Also −100, however the batches are cut and whether the trainer or a script makes them."""
    config = MLXEsmConfig(**tiny("ESM-2", num_labels=1, problem_type=problem_type, **OFF))
    mx.random.seed(0)
    model = MLXEsmForSequenceClassification(config)
    rows = [
        {"input_ids": row["input_ids"], "label": label}
        for row, label in zip(classified_rows(4), (-100, -50, 0, 10), strict=True)
    ]

    class Given(MLXTrainer):
        def get_eval_dataloader(self, eval_dataset=None):
            groups = [rows[first : first + size] for first in range(0, len(rows), size)]
            return [dict(self.data_collator(group)) for group in groups]

    args = {"per_device_eval_batch_size": size}
    trainer = training(tmp_path, Given if own_batches else MLXTrainer, model=model, args=args, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx((10000 + 2500 + 100) / 4, rel=0.05)


def test_loss_functions_and_label_smoothing(tmp_path):
    """`compute_loss_func` and `label_smoothing_factor` give the losses of transformers."""

    def summed(outputs, labels, num_items_in_batch=None):
        return nn.losses.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    usual, given = training(tmp_path), training(tmp_path, compute_loss_func=summed)
    assert given.evaluate()["eval_loss"] == pytest.approx(usual.evaluate()["eval_loss"], rel=1e-5)
    usual.train(), given.train()
    assert np.allclose(losses(usual), losses(given), rtol=1e-4)

    ours, theirs = twins("ForSequenceClassification", tmp_path, num_labels=2)
    rows, settings = classified_rows(6), {"label_smoothing_factor": 0.2}
    args = transformers.TrainingArguments(tmp_path / "theirs", use_cpu=True, report_to="none", **settings)
    twin = transformers.Trainer(theirs, args, eval_dataset=rows, processing_class=esm2_tokenizer())
    expected = twin.evaluate()["eval_loss"]
    found = training(tmp_path, model=ours, args=settings, eval_dataset=rows).evaluate()["eval_loss"]
    assert found == pytest.approx(expected, rel=1e-4)


def test_label_smoothing_refuses_labels_that_are_no_classes(tmp_path):
    """Also integers of a regression, and a class that the model does not have. transformers fails there as well."""
    settings = {"label_smoothing_factor": 0.2, "max_steps": 1}
    for size, problem, label, message in (
        (1, "regression", 0.5, "label_smoothing_factor needs class labels"),
        (1, "regression", 1, "label_smoothing_factor needs class labels"),
        (2, "single_label_classification", 2, "Labels must be 0 to 1"),
    ):
        rows = [{**row, "label": label} for row in classified_rows(4)]
        ours, theirs = twins("ForSequenceClassification", tmp_path, num_labels=size, problem_type=problem)
        args = transformers.TrainingArguments(tmp_path / "theirs", use_cpu=True, report_to="none", **settings)
        twin = transformers.Trainer(theirs, args, train_dataset=rows, processing_class=esm2_tokenizer())
        with pytest.raises(RuntimeError):
            twin.train()
        trainer = training(tmp_path / "ours", model=ours, args=settings, train_dataset=rows)
        with pytest.raises(UserError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0


@pytest.mark.parametrize("kind", ["array", "dictionary", "tuple"])
def test_any_module_that_returns_a_loss(tmp_path, kind):
    """It is saved as safetensors. The contact head of a model inside it does not decay."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = MLXEsmModel(MLXEsmConfig(**tiny("ESM-2", **OFF)), add_pooling_layer=False)
            self.head = nn.Linear(self.encoder.config.hidden_size, 2)

        def __call__(self, input_ids, attention_mask, labels=None):
            logits = self.head(self.encoder(input_ids, attention_mask).last_hidden_state[:, 0])
            if labels is None:
                return {"logits": logits}
            loss = nn.losses.cross_entropy(logits, labels).mean()
            return {"array": loss, "dictionary": {"loss": loss, "logits": logits}, "tuple": (loss, logits)}[kind]

    settings = {"save_strategy": "steps", "save_steps": 2, "weight_decay": 0.5, "learning_rate": 3e-3}
    trainer = training(tmp_path, model=Own(), args=settings)
    contact = np.array(trainer.model.encoder.contact_head.regression.weight)
    trainer.train()
    assert np.array_equal(contact, trainer.model.encoder.contact_head.regression.weight)
    assert trainer.evaluate()["eval_loss"] > 0
    assert kind == "array" or trainer.predict(classified_rows(3)).predictions.shape == (3, 2)
    trainer.save_model(tmp_path / "saved")
    saved = mx.load(str(tmp_path / "saved" / "model.safetensors"))
    assert mx.array_equal(saved["head.weight"], trainer.model.head.weight)
    other = training(tmp_path, model=Own(), args=settings)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert np.allclose(losses(other), losses(trainer))


# Overridden methods


def test_model_card(tmp_path):
    """The arguments are those of transformers' method; the metadata is what it writes as well."""
    base, theirs = twins("ForSequenceClassification", tmp_path, num_labels=2)
    given = {
        "language": "en",
        "license": "mit",
        "tags": "toxicity",
        "finetuned_from": "me/base",
        "dataset_tags": "me/d",
    }
    given |= {"model_name": "mine", "tasks": "text-classification", "dataset": "D", "dataset_args": "all"}
    trainer = training(tmp_path / "ours", model=base)
    trainer.create_model_card(**given)
    args = transformers.TrainingArguments(tmp_path / "theirs", use_cpu=True, report_to="none")
    transformers.Trainer(theirs, args, processing_class=esm2_tokenizer()).create_model_card(**given)
    ours, wanted = (ModelCard.load(tmp_path / side / "README.md") for side in ("ours", "theirs"))
    for name in ("language", "license", "base_model", "library_name"):
        assert ours.data[name] == wanted.data[name], name
    assert {*wanted.data.tags} <= {*ours.data.tags} and ours.data.datasets == ["me/d"]
    assert "# mine" in ours.text and 'from_pretrained("mine")' in ours.text
    assert MLXEsmForSequenceClassification.from_pretrained(tmp_path / "ours").num_labels == 2

    add_adapters(base, LoraConfig(target_modules=["query"]))
    with pytest.raises(UserError, match="merge the adapters first"):
        trainer.create_model_card()


def test_methods_that_are_never_called_are_refused():
    """Every method of transformers' Trainer is called here, or refused."""
    theirs = {name for name in vars(transformers.Trainer) if not name.startswith("__")}
    assert theirs - NOT_CALLED <= set(dir(MLXTrainer))
    for name in ("training_step", "floating_point_ops", "_save_checkpoint", "_get_eval_sampler"):
        with pytest.raises(TypeError, match=f"Mine overrides {name}, which MLXTrainer never calls"):
            type("Mine", (MLXTrainer,), {name: lambda self: None})
    assert theirs >= NOT_CALLED


def test_methods_of_mixins_are_refused_as_well():
    class Mixin:
        def training_step(self):
            pass

    with pytest.raises(TypeError, match="Mine overrides training_step"):
        type("Mine", (Mixin, MLXTrainer), {})


def test_a_loss_without_return_outputs(tmp_path):
    class Short(MLXTrainer):
        def compute_loss(self, model, inputs):
            return 2 * model(**inputs).loss

    short, usual = training(tmp_path, Short), training(tmp_path)
    assert short.evaluate()["eval_loss"] == pytest.approx(2 * usual.evaluate()["eval_loss"], rel=1e-5)
    assert short.predict(classified_rows(3)).predictions.shape == (3, 2)


def test_a_log_that_is_not_kept(tmp_path):
    """The loss is the mean since the last line, also if a subclass writes the lines elsewhere."""
    lines = []

    class Elsewhere(MLXTrainer):
        def log(self, logs, *args):
            lines.append(logs)

    usual = training(tmp_path)
    usual.train()
    training(tmp_path, Elsewhere).train()
    assert np.allclose([line["loss"] for line in lines if "loss" in line], losses(usual), rtol=1e-5)


def test_overridden_methods_are_called(tmp_path):
    called = []

    class Mine(MLXTrainer):
        def log(self, logs, *args):
            called.append("log")
            super().log({**logs, "mine": 1.0}, *args)

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            called.append("prediction_step")
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

        def evaluation_loop(self, *args, **kwargs):
            called.append("evaluation_loop")
            return super().evaluation_loop(*args, **kwargs)

        def get_eval_dataloader(self, eval_dataset=None):
            called.append("get_eval_dataloader")
            return [self.data_collator(classified_rows(4, seed=seed)) for seed in (1, 2)]

        def get_train_dataloader(self):
            called.append("get_train_dataloader")
            rows = [{name: row[name] for name in ("input_ids", "label")} for row in classified_rows(24)]
            collate = transformers.DataCollatorWithPadding(esm2_tokenizer(), return_tensors="pt")
            return torch.utils.data.DataLoader(rows, batch_size=8, collate_fn=collate)

        def create_scheduler(self, num_training_steps, optimizer=None):
            called.append("create_scheduler")
            return lambda step: 1e-3 * (step + 1)

        def create_optimizer(self):
            called.append("create_optimizer")
            return optim.SGD(1e-3)

        def save_model(self, *args, **kwargs):
            called.append("save_model")
            super().save_model(*args, **kwargs)

    rows = [{name: row[name] for name in ("input_ids", "label")} for row in classified_rows(4)]
    settings = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch"}
    trainer = training(tmp_path, Mine, args=settings, train_dataset=rows)
    trainer.data_collator = lambda rows: transformers.DataCollatorWithPadding(esm2_tokenizer(), return_tensors="np")(
        [{name: row[name] for name in ("input_ids", "label")} for row in rows]
    )
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    names = {"log", "prediction_step", "evaluation_loop", "get_eval_dataloader", "get_train_dataloader"}
    assert set(called) == names | {"create_scheduler", "create_optimizer", "save_model"}
    assert trainer.state.global_step == 6 and trainer.state.log_history[-1]["mine"] == 1.0
    assert np.allclose(losses(trainer, "learning_rate"), [1e-3 * step for step in range(1, 7)])
    assert len(losses(trainer, "eval_loss")) == 2


def test_samplers(tmp_path):
    """A sampler chooses the items of each epoch, such as those of a rare class."""
    rows = classified_rows(20)
    chosen = [i for i, row in enumerate(rows) if row["label"] == 1][:4]
    seen = []

    class Sampled(MLXTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SubsetRandomSampler(chosen)

    def collate(rows):
        seen.extend(row["label"] for row in rows)
        return transformers.DataCollatorWithPadding(esm2_tokenizer(), return_tensors="np")(rows)

    trainer = training(tmp_path, Sampled, train_dataset=rows, data_collator=collate, args={"max_steps": 3})
    trainer.train()
    assert seen == [1] * 12


def test_layers_with_learning_rates_of_their_own(tmp_path):
    class Layered(MLXTrainer):
        def create_optimizer(self):
            names = [name for name, _ in tree_flatten(self.model.trainable_parameters())]
            head = [name for name in names if name.startswith("classifier")]
            groups = [{"params": head, "lr": 1e-2}, {"params": [n for n in names if n not in head], "lr": 0.0}]
            self.optimizer = AdamW(self.model.trainable_parameters(), 1e-2, groups=groups)
            return self.optimizer

    trainer = training(tmp_path, Layered)
    before = dict(tree_flatten(trainer.model.parameters()))
    trainer.train()
    changed = {n for n, x in tree_flatten(trainer.model.parameters()) if not mx.array_equal(x, before[n])}
    assert changed and all(name.startswith("classifier") for name in changed)


# Arguments


def test_callbacks_are_those_of_transformers(tmp_path):
    """They see the events of a training in transformers' order."""
    events = {"ours": [], "theirs": []}

    def recorder(place):
        class Recorder(transformers.TrainerCallback):
            pass

        for name in dir(transformers.TrainerCallback):
            if name.startswith("on_") and name not in (
                *("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_prediction_step"),
            ):

                def event(self, args, state, control, name=name, **kwargs):
                    events[place].append((name, state.global_step, round(state.epoch or 0, 3), state.max_steps))

                setattr(Recorder, name, event)
        return Recorder

    ours, theirs = twins("ForSequenceClassification", tmp_path, num_labels=2)
    data = {
        "train_dataset": classified_rows(8),
        "eval_dataset": classified_rows(4),
        "processing_class": esm2_tokenizer(),
    }
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "eval_strategy": "epoch", "logging_steps": 1}
    settings |= {"save_strategy": "epoch"}
    args = transformers.TrainingArguments(tmp_path / "t", use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    transformers.Trainer(theirs, args, callbacks=[recorder("theirs")], **data).train()
    MLXTrainer(ours, MLXTrainingArguments(tmp_path / "o", **settings), callbacks=[recorder("ours")], **data).train()
    assert events["ours"] == events["theirs"]


def test_early_stopping_stops_and_is_resumed(tmp_path):
    """The best checkpoint is a path. The patience continues to count in a resumed training."""
    scores = [0.5, 0.7, 0.6, 0.65, 0.9]

    def run(place, resume=None, patience=2):
        left = iter(scores[0 if resume is None else 3 :])
        callback = transformers.EarlyStoppingCallback(early_stopping_patience=patience)
        settings = {
            "max_steps": 10,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        settings |= {"load_best_model_at_end": True, "metric_for_best_model": "score"}
        trainer = training(
            place, args=settings, callbacks=[callback], compute_metrics=lambda _: {"score": np.float32(next(left))}
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = run(tmp_path)
    assert trainer.state.global_step == 8
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best = MLXEsmForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert mx.array_equal(best.classifier.dense.weight, trainer.model.classifier.dense.weight)
    again = run(tmp_path, str(tmp_path / "checkpoint-6"))
    assert again.state.global_step == 8
    assert trainer.callbacks.callbacks[0].early_stopping_patience_counter == 2
    with pytest.raises(ValueError, match="ends an epoch early"):

        class Stop(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_epoch_stop = True

        training(tmp_path / "other", callbacks=[Stop]).train()


def test_callbacks_can_be_added_and_removed(tmp_path):
    class Counter:
        count = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.count += 1
            control.should_training_stop = self.count == 3

    trainer, counter = training(tmp_path), Counter()
    trainer.add_callback(counter)
    trainer.add_callback(transformers.EarlyStoppingCallback)
    assert isinstance(trainer.pop_callback(transformers.EarlyStoppingCallback), transformers.EarlyStoppingCallback)
    trainer.train()
    assert counter.count == trainer.state.global_step == 3
    trainer.remove_callback(counter)
    assert trainer.pop_callback(counter) is None


def test_optimizers_and_model_init(tmp_path):
    def schedule(step):
        return 0.1 / (step + 1)

    trainer = training(tmp_path, optimizers=(optim.SGD(0.1), schedule), model_init=lambda trial: classifier())
    first = trainer.train().training_loss
    assert np.allclose(losses(trainer, "learning_rate"), [0.1, 0.05, 0.1 / 3, 0.025])
    assert trainer.train().training_loss == first
    with pytest.raises(ValueError, match="either a model or a model_init"):
        MLXTrainer(classifier(), model_init=classifier)


def test_metrics_of_numpy_and_preprocessed_logits(tmp_path):
    def metrics(evaluated):
        assert evaluated.predictions.ndim == 1 and evaluated.inputs.shape[0] == 6 and evaluated.losses.shape == (6,)
        right = evaluated.predictions == evaluated.label_ids
        return {"accuracy": right.mean(), "count": np.int64(right.size), "row": np.arange(2)}

    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = training(
        tmp_path, args=settings | {"include_for_metrics": ["inputs", "loss"]}, compute_metrics=metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(axis=-1),
    )  # fmt: skip
    trainer.train()
    (line, *_) = [line for line in trainer.state.log_history if "eval_accuracy" in line]
    assert type(line["eval_accuracy"]) is float and line["eval_count"] == 6 and line["eval_row"] == [0, 1]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["train_loss"] > 0


def test_a_dictionary_of_evaluation_sets(tmp_path):
    sets = {"near": classified_rows(4, seed=1), "far": classified_rows(6, seed=2)}
    settings = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "far_loss"}
    trainer = training(tmp_path, args=settings, eval_dataset=sets)
    trainer.train()
    found = trainer.evaluate()
    assert trainer.state.best_metric == pytest.approx(found["eval_far_loss"])
    assert found["eval_near_loss"] == pytest.approx(trainer.evaluate(sets["near"])["eval_loss"])
    assert trainer.evaluate("near")["eval_near_loss"] == found["eval_near_loss"]
    with pytest.raises(ValueError, match="evaluation data 'far' have no length"):
        training(tmp_path, eval_dataset={"far": iter([])})


def test_iterable_data(tmp_path):
    class Stream:
        def __iter__(self):
            yield from classified_rows(20)

    trainer = training(tmp_path, train_dataset=Stream(), args={"max_steps": 5})
    trainer.train()
    assert trainer.state.global_step == 5 and trainer.state.epochs_done == 1
    with pytest.raises(ValueError, match="have no length, so the number of steps is unknown: set max_steps"):
        training(tmp_path, train_dataset=Stream(), args={"max_steps": -1}).train()


def test_when_to_log_evaluate_and_save(tmp_path):
    settings = {"max_steps": 8, "logging_strategy": "epoch", "logging_first_step": True, "eval_strategy": "steps"}
    settings |= {"eval_steps": 0.25, "eval_delay": 4, "eval_on_start": True, "save_strategy": "best"}
    scores = iter([0.0, 3.0, 2.0, 4.0])
    trainer = training(
        tmp_path, args=settings | {"metric_for_best_model": "score", "save_total_limit": 5},
        compute_metrics=lambda _: {"score": next(scores)},
    )  # fmt: skip
    trainer.train()
    steps = {name: [x["step"] for x in trainer.state.log_history if name in x] for name in ("loss", "eval_score")}
    assert steps == {"loss": [1, 2, 4, 6, 8], "eval_score": [0, 4, 6, 8]}
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]


def test_order_and_size_of_batches(tmp_path):
    rows, seen = classified_rows(19), []

    def collate(rows):
        seen.append([len(row["input_ids"]) for row in rows])
        return transformers.DataCollatorWithPadding(esm2_tokenizer(), return_tensors="np")(rows)

    def batches(**settings):
        seen.clear()
        args = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 4} | settings
        training(tmp_path, train_dataset=rows, data_collator=collate, args=args).train()
        return [list(batch) for batch in seen]

    lengths = [len(row["input_ids"]) for row in rows]
    assert sum(batches(train_sampling_strategy="sequential"), []) == lengths
    grouped = batches(train_sampling_strategy="group_by_length")
    assert sum(grouped, []) == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches(dataloader_drop_last=True)] == [4] * 4
    assert batches(data_seed=1) != batches(data_seed=2)


def test_files_of_metrics_and_state(tmp_path, capsys):
    trainer = training(tmp_path)
    result = trainer.train()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_metrics("eval", {"eval_loss": np.float32(0.5)})
    trainer.save_state()
    assert "***** train metrics *****" in capsys.readouterr().out
    combined = json.loads((tmp_path / "all_results.json").read_text())
    assert combined["eval_loss"] == 0.5 and math.isfinite(combined["train_loss"])
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 4
    assert trainer.is_world_process_zero() and trainer.is_local_process_zero()
    assert trainer.get_num_trainable_parameters() == trainer.model.num_parameters(only_trainable=True)


def test_checkpoints_without_what_resuming_needs(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    training(tmp_path, args=settings).train()
    MLXEsmForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-4"):
        training(tmp_path, args=settings).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="leave out save_only_model"):
        MLXTrainingArguments(load_best_model_at_end=True, eval_strategy="steps", save_only_model=True)


def test_a_token_model_with_dropout_still_resumes(tmp_path):
    """Losses of a resumed training are those of the first run, with checkpointing and dropout."""
    config = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    whole = small_training(tmp_path, config=config, gradient_checkpointing=True, max_steps=8)
    whole.train()
    again = small_training(tmp_path, config=config, gradient_checkpointing=True, max_steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(again) == losses(whole)
