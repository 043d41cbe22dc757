"""`MLXTrainingArguments` compared with transformers' `TrainingArguments`."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from mlx_esm_hf.training import arguments
from mlx_esm_hf.training.argument_groups import NEWER, IgnoredArguments, OlderArguments, RefusedArguments
from mlx_esm_hf.training.arguments import MLXTrainingArguments


@pytest.mark.parametrize("warmup", [0, 7, 0.25])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("cosine", {"num_cycles": 1.5}),
        ("cosine_with_restarts", {}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {}),
        ("polynomial", {"lr_end": 0.01, "power": 2.0}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("inverse_sqrt", {}),
        ("inverse_sqrt", {"timescale": 20}),
        ("cosine_with_min_lr", {"min_lr": 0.03}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.2, "num_cycles": 1.0}),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.2}),
        ("cosine_warmup_with_min_lr", {"min_lr": 0.03, "warmup_lr_rate": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 10}),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 12, "num_stable_steps": 5, "warmup_type": "cosine", "decay_type": "1-sqrt"},
        ),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 9, "warmup_type": "1-sqrt", "decay_type": "linear", "min_lr_ratio": 0.1},
        ),
    ],
)
def test_schedules_equal_transformers(name, options, warmup):
    args = MLXTrainingArguments(
        learning_rate=0.3, lr_scheduler_type=name, lr_scheduler_kwargs=options, warmup_steps=warmup
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    steps = args.get_warmup_steps(40) if name != "constant" else None
    scheduler = transformers.get_scheduler(name, optimizer, steps, 40, options)
    for step in range(40):
        assert args.learning_rate_at(step, 40) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def names_of(arguments):
    return {field.name for field in dataclasses.fields(arguments)}


PAGE = Path(__file__).parents[2] / "docs" / "training" / "trainer.md"


def rows_of(header):
    """Return the rows of the table with this header on the page of the trainer."""
    table = PAGE.read_text(encoding="utf-8").partition(f"| {header} |\n|---|---|\n")[2].partition("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines()]


def test_the_documentation_lists_every_argument_once():
    implemented = [name for _, cell in rows_of("what | arguments") for name in cell.split(", ")]
    ignored = [name for _, cell in rows_of("why | arguments") for name in cell.split(", ")]
    refused = {f"`{field.name}`": field.metadata["help"] for field in dataclasses.fields(RefusedArguments)}
    assert sorted(ignored) == sorted(f"`{name}`" for name in names_of(IgnoredArguments))
    assert dict(rows_of("argument | what to do")) == refused
    assert dict(rows_of("older name | newer name")) == {f"`{old}`": f"`{new}`" for old, (new, _) in NEWER.items()}
    others = names_of(MLXTrainingArguments) - names_of(IgnoredArguments) - names_of(RefusedArguments) - NEWER.keys()
    assert sorted(implemented) == sorted(f"`{name}`" for name in others)


# Arguments that other arguments or transformers' callbacks read.
READ_ELSEWHERE = {
    "fp16", "activation_checkpointing", "greater_is_better", "lr_scheduler_type", "lr_scheduler_kwargs", "run_name",
    "warmup_ratio", "warmup_steps", "hub_strategy", "project", "trackio_bucket_id", "trackio_space_id",
    "trackio_static_space_id",
}  # fmt: skip


def test_the_trainer_reads_every_implemented_argument():
    folder = Path(arguments.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py") if path.name != "arguments.py"]
    read = set(re.findall(r"""args\.(?:interval\(")?(\w+)""", "\n".join(sources)))
    assert MLXTrainingArguments.__annotations__.keys() - read - READ_ELSEWHERE == set()


def test_the_docstring_describes_every_implemented_argument():
    lines = (MLXTrainingArguments.__doc__ or "").splitlines()
    described = [name for line in lines if line.startswith("        ") for name in line.partition(":")[0].split(",")]
    assert MLXTrainingArguments.__annotations__.keys() <= {name.strip() for name in described}


def test_every_argument_of_transformers_is_known():
    assert names_of(transformers.TrainingArguments) <= names_of(MLXTrainingArguments)
    assert NEWER.keys() == names_of(OlderArguments)


def test_defaults_equal_transformers(tmp_path):
    theirs = transformers.TrainingArguments(tmp_path)
    ours = MLXTrainingArguments(tmp_path)
    names = [name for name in vars(ours) if hasattr(theirs, name)]
    values = {name: getattr(theirs, name) for name in names}
    values = {name: getattr(value, "value", value) for name, value in values.items()}  # some are enumerations
    differ = {name for name in names if getattr(ours, name) != values[name]}
    # transformers converts the first two, and shows or hides the progress bar according to its log level.
    assert differ <= {"accelerator_config", "debug", "disable_tqdm"}
    assert names_of(transformers.TrainingArguments) <= set(names)


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
    with pytest.raises(TypeError, match="learning_rates"):
        MLXTrainingArguments("out", learning_rates=[1e-3])


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("deepspeed", "config.json", "mlx.launch"),
        ("fsdp", "full_shard", "whole model"),
        ("auto_find_batch_size", True, "batch_tokens"),
        ("neftune_noise_alpha", 5.0, "compute_loss"),
        ("save_safetensors", False, "always written"),
    ],
)
def test_what_would_change_the_training_is_refused_by_name(name, value, advice):
    with pytest.raises(ValueError, match=f"{name}=.* is not supported. .*{advice}"):
        MLXTrainingArguments("out", **{name: value})


def test_refused_arguments_may_have_their_defaults():
    defaults = {field.name: field.default for field in dataclasses.fields(RefusedArguments)}
    MLXTrainingArguments("out", **defaults | {"fsdp": None, "debug": [], "deepspeed": ""})


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"evaluation_strategy": "epoch"}, {"eval_strategy": "epoch"}),
        ({"per_gpu_train_batch_size": 3}, {"per_device_train_batch_size": 3}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        ({"include_inputs_for_metrics": True}, {"include_for_metrics": ["inputs"]}),
        ({"push_to_hub_model_id": "me/model"}, {"hub_model_id": "me/model"}),
    ],
)
def test_older_names_set_the_newer_ones(older, newer):
    with pytest.warns(FutureWarning, match=next(iter(newer))) as caught:
        args = MLXTrainingArguments("out", **older)
    assert caught[0].filename == __file__
    assert args == MLXTrainingArguments("out", **newer)


def test_an_older_name_and_another_value_under_the_newer_one_are_refused():
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="give only eval_strategy"):
        MLXTrainingArguments("out", evaluation_strategy="epoch", eval_strategy="steps")


def test_float16_trains_in_bfloat16():
    with pytest.warns(UserWarning, match="bfloat16") as caught:
        args = MLXTrainingArguments("out", fp16=True)
    assert caught[0].filename == __file__
    assert args.bf16 and not args.fp16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eval_strategy": "sometimes"}, "must be one of no, steps, epoch, got 'sometimes'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "must be one of linear"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 2}}, "Did you mean num_cycles"),
        ({"lr_scheduler_kwargs": "num_cycles=2"}, "must be a JSON object, got 'num_cycles=2'"),
        ({"lr_scheduler_kwargs": "[2]"}, "must be a JSON object"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, "lr_end must be below"),
        ({"report_to": "mlflow"}, "report_to must be any of tensorboard, wandb, trackio"),
        ({"fp16": True, "bf16": True}, "only bf16"),
        ({"eval_steps": 1.5, "eval_strategy": "steps"}, "eval_steps must be an integer"),
        ({"hub_strategy": "all_checkpoints"}, "hub_strategy must be one of end, every_save"),
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


@pytest.mark.parametrize(("save", "evaluation", "fits"), [(0.2, 0.1, True), (0.3, 0.2, False), (20, 0.1, False)])
def test_the_best_model_with_fractions_as_steps(save, evaluation, fits):
    steps = {"save_steps": save, "eval_steps": evaluation, "eval_strategy": "steps", "load_best_model_at_end": True}
    if fits:
        args = MLXTrainingArguments("out", **steps)
        assert (args.interval("save_steps", 101), args.interval("eval_steps", 101)) == (21, 11)
    else:
        with pytest.raises(ValueError, match="multiple of eval_steps"):
            MLXTrainingArguments("out", **steps)


@dataclasses.dataclass
class ModelArguments:
    """A script's own arguments."""

    model_name_or_path: str = "esm"
    use_lora: bool = False


COMMAND = [
    "--output_dir", "out", "--learning_rate", "1e-3", "--do_train", "--gradient_checkpointing", "--use_lora",
    "--label_names", "a", "b", "--eval_strategy", "steps", "--eval_steps", "0.1", "--save_steps", "20",
    "--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-5}', "--report_to", "none",
    "--no_remove_unused_columns", "--dataloader_num_workers", "4", "--bf16", "True", "--disable_tqdm", "yes",
]  # fmt: skip


def test_the_command_line_of_a_script(tmp_path):
    parser = transformers.HfArgumentParser((ModelArguments, MLXTrainingArguments))
    own, args = parser.parse_args_into_dataclasses(COMMAND)
    assert own.use_lora
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5} and args.label_names == ["a", "b"] and args.report_to == []
    assert args.do_train and args.do_eval and args.gradient_checkpointing and args.bf16 and args.disable_tqdm
    assert not args.remove_unused_columns
    assert (args.eval_steps, args.save_steps, args.learning_rate) == (0.1, 20, 1e-3)
    assert "mlx.launch" in parser.format_help()

    values = {"output_dir": "out", "learning_rate": 1e-3, "seed": 7, "report_to": ["none"], "use_lora": True}
    (tmp_path / "args.json").write_text(json.dumps(values))
    for own, args in (parser.parse_dict(values), parser.parse_json_file(str(tmp_path / "args.json"))):
        assert own.use_lora and args == MLXTrainingArguments("out", learning_rate=1e-3, seed=7)


def test_arguments_as_dictionaries():
    args = MLXTrainingArguments("out", hub_token="secret", lr_scheduler_type=transformers.SchedulerType.COSINE)
    assert "secret" not in args.to_json_string() + repr(args) + str(args.to_sanitized_dict())
    assert json.loads(args.to_json_string())["lr_scheduler_type"] == "cosine"
    assert names_of(transformers.TrainingArguments) <= args.to_dict().keys()
    assert args.to_sanitized_dict()["lr_scheduler_kwargs"] == "None"


def test_what_scripts_ask_the_arguments_for():
    args = MLXTrainingArguments("out", per_device_train_batch_size=3, log_level="error")
    assert (args.train_batch_size, args.eval_batch_size, args.world_size, args.process_index) == (3, 8, 1, 0)
    assert args.should_save and args.should_log and args.parallel_mode.value == "not_parallel"
    assert args.get_process_log_level() == 40
    with args.main_process_first(desc="tokenize"):
        pass
