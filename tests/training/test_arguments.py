"""`MLXTrainingArguments` compared with transformers' `TrainingArguments`."""

import pytest
import torch
import transformers

from mlx_esm_hf.training.arguments import MLXTrainingArguments


@pytest.mark.parametrize("warmup", [0, 7, 0.25])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_schedules_equal_transformers(schedule, warmup):
    args = MLXTrainingArguments(learning_rate=0.3, lr_scheduler_type=schedule, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    steps = args.get_warmup_steps(40) if schedule != "constant" else None
    scheduler = transformers.get_scheduler(schedule, optimizer, steps, 40)
    for step in range(40):
        assert args.learning_rate_at(step, 40) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_defaults_equal_transformers(tmp_path):
    theirs = transformers.TrainingArguments(tmp_path)
    ours = MLXTrainingArguments(tmp_path)
    names = [name for name in vars(ours) if hasattr(theirs, name)]
    values = {name: getattr(theirs, name) for name in names}
    values = {name: getattr(value, "value", value) for name, value in values.items()}  # some are enumerations
    differ = {name for name in names if getattr(ours, name) != values[name]}
    # transformers reports to all installed integrations and replaces some values of None.
    assert differ <= {"report_to", "eval_steps", "disable_tqdm", "warmup_ratio", "output_dir"}
    assert len(names) >= 25


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        (None, False),
        ("loss", False),
        ("root_mean_squared_error", False),
        ("eval_mean_absolute_error", False),
        ("roc_auc", True),
    ],
)
def test_a_lower_error_is_better(metric, higher):
    assert MLXTrainingArguments("out", metric_for_best_model=metric).higher_is_better is higher
    args = MLXTrainingArguments("out", metric_for_best_model=metric, greater_is_better=not higher)
    assert args.higher_is_better is not higher


def test_an_unknown_argument_is_an_error():
    with pytest.raises(TypeError, match="deepspeed"):
        MLXTrainingArguments("out", deepspeed="config.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eval_strategy": "sometimes"}, "must be one of no, steps, epoch, got 'sometimes'"),
        ({"lr_scheduler_type": "polynomial"}, "must be one of linear"),
        ({"report_to": "wandb"}, "log.jsonl"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "set the same thing"),
        (
            {"per_device_train_batch_size": 0},
            "per_device_train_batch_size must be an integer from 1 to 2147483647, got 0",
        ),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, at least 0, got nan"),
        ({"load_best_model_at_end": True}, "set eval_strategy and save_strategy to the same value"),
        (
            {
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "save_strategy": "steps",
                "eval_steps": 100,
                "save_steps": 150,
            },
            "multiple of eval_steps",
        ),
    ],
)
def test_invalid_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLXTrainingArguments("out", **arguments)
