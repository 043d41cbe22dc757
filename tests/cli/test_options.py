"""Every numeric option of every command, and every numeric argument of the Python functions."""

import inspect
import math
from typing import get_args, get_type_hints

import pytest

from mlx_esm_hf import MLXTrainingArguments, contacts, convert, embed, fill_mask, fold, generate, perplexity, score
from mlx_esm_hf.cli import app
from mlx_esm_hf.training.finetune import finetune
from mlx_esm_hf.training.pretrain import pretrain
from tests.cli.invoking import command_line, invoke
from tests.jobs.models import write_model

BAD = ("nan", "inf", "-1", "0", str(10**30), "1.5", "")
# Numeric options that are text, because they are lists or have words as well.
TEXTS = {"layers", "batch_tokens", "weights", "shape", "max_shard_size", "fixed"}
# What the values above mean where they are allowed: {option: values}.
MEANINGS = {
    "--layers": {"-1", "0"},  # the last layer, and the embeddings
    "--top-k": {"0"},  # generate: all residues
    "--sweeps": {"0"},
    "--temperature": {"0", "1.5", str(10**30)},  # 0: the most probable residue
    "--seed": {"0"},
    "--first-residue": {"-1", "0"},
    "--num-recycles": {"0"},
    "--loops": {"0"},
    "--learning-rate": {"0", "1.5", str(10**30)},
    "--warmup": {"0", "1.5"},
    "--weight-decay": {"0", "1.5", str(10**30)},
    "--clip": {"0", "1.5", str(10**30)},  # 0: off
    "--epochs": {"1.5"},
    "--weights": {"1.5", str(10**30)},
    "--alpha": {"-1", "0", "1.5", str(10**30)},
    "--dropout": {"0"},
    "--validation-share": {"0"},  # train: no validation
}
REFUSED_ALL_THE_SAME = {("fill-mask", "--top-k", "0"), ("finetune", "--validation-share", "0")}


def numeric_options():
    for info in app.registered_commands:
        types = get_type_hints(info.callback)
        for parameter in command_line().commands[info.name].params:
            kind = types.get(parameter.name)
            if {int, float} & {kind, *get_args(kind)} or parameter.name in TEXTS:
                yield info.name, parameter.opts[0]


OPTIONS = list(numeric_options())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    write_model(place / "model")
    (place / "a.fasta").write_text(">a\nMKT<mask>YIAKQR\n")
    (place / "t.csv").write_text("sequence,label\n" + "".join(f"MKT{a},{b}\n" for a in "ACDEFGHIKL" for b in "x"))
    return place


def command_of(name, place):
    model = ["--model", "./no/model"]  # so that a command that accepts the value ends
    return {
        "embed": [name, "a.fasta", *model, "--output", "o.h5"],
        "fill-mask": [name, "a.fasta", *model, "--output", "o.csv"],
        "contacts": [name, "a.fasta", *model, "--output", "o.npz"],
        "perplexity": [name, "a.fasta", *model, "--output", "o.csv"],
        "generate": [name, "a.fasta", *model, "--output", "o.fasta"],
        "fold": [name, "a.fasta", *model, "--output", "o"],
        "score": [name, "--sequence", "MKT", *model, "--output", "o.csv"],
        "train": [name, "a.fasta", *model, "--output", "o"],
        "finetune": [name, "t.csv", *model, "--output", "o"],
        "convert": [name, "./no/model", "o", "--quantize"],
    }[name]


def test_all_options_are_found():
    names = {option for _, option in OPTIONS}
    assert {"--epochs", "--weights", "--bits", "--group-size", "--top-p", "--layers", "--max-shard-size"} <= names
    assert len(OPTIONS) > 50
    assert MEANINGS.keys() <= names


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=lambda value: value)
def test_numeric_option(name, option, place, monkeypatch):
    monkeypatch.chdir(place)
    for value in BAD:
        arguments = command_of(name, place)
        if option == "--shape":
            arguments = [a for a in arguments if a not in ("--model", "./no/model")]
        code, shown = invoke(*arguments, f"{option}={value}")
        assert code in (1, 2), (value, shown)
        allowed = value in MEANINGS.get(option, ()) and (name, option, value) not in REFUSED_ALL_THE_SAME
        if option == "--length" or "no/model not found" in shown:
            assert allowed or option == "--length" and "Give a FASTA" in shown or option in shown, (value, shown)
        else:
            argument = option.removeprefix("--").replace("-", "_")
            named = [option, argument, "list of positions"] if option == "--fixed" else [option, argument]
            assert not allowed and any(one in shown for one in named), (value, shown)


NOT_NUMBERS = (math.nan, math.inf, -math.inf, "1", None, [], 10**30, 1 + 2j)
FLOATS = {"temperature", "top_p", "validation_share", "alpha", "dropout"}
INTEGERS = {
    *("top_k", "length", "samples", "sweeps", "seed", "num_recycles", "batch_tokens", "first_residue", "rank"),
    *("context", "bits", "group_size"),
}
JOBS = {
    embed: {"proteins": ["MKT"], "layers": [0]},
    contacts: {"proteins": ["MKT"]},
    fill_mask: {"proteins": ["MK<mask>"]},
    perplexity: {"proteins": ["MKT"]},
    generate: {"proteins": ["MK<mask>"]},
    fold: {"proteins": ["MKT"]},
    score: {"mutants": ["M1A"], "sequence": "MKT"},
    finetune: {"table": "t.csv", "output": "o"},
    pretrain: {"proteins": ["a.fasta"], "output": "o"},
    convert: {"source": "./no/model", "output": "o", "quantize": True},
}
ARGUMENTS = [
    (job, name)
    for job in JOBS
    for name in [*inspect.signature(job).parameters, "batch_tokens"]
    if name in FLOATS | INTEGERS and not (name == "batch_tokens" and job in (convert, finetune, pretrain))
]


@pytest.mark.parametrize(
    ("job", "argument"), dict.fromkeys(ARGUMENTS), ids=lambda value: getattr(value, "__name__", value)
)
def test_argument_of_a_python_function(job, argument, place, monkeypatch):
    monkeypatch.chdir(place)
    values = [*NOT_NUMBERS, *([] if argument in FLOATS else [1.5, 2.0])]
    optional = inspect.signature(job).parameters.get(argument)
    for value in values:
        if value is None and (optional is None or optional.default is None):
            continue
        if value == 10**30 and argument in ("temperature", "alpha"):
            continue
        changed = {"proteins": None} if argument == "length" else {}
        if job is not convert:
            changed["model"] = "./no/model"
        with pytest.raises(ValueError, match=argument):
            job(**JOBS[job] | changed | {argument: value})


NUMBERS = [
    name
    for name, kind in MLXTrainingArguments.__annotations__.items()  # without arguments that have no effect
    if str(kind).startswith(("int", "float"))
]


@pytest.mark.parametrize("name", NUMBERS)
def test_training_argument(name):
    assert len(NUMBERS) >= 18
    for value in (math.nan, math.inf, -2, "1", [], True):
        with pytest.raises(ValueError, match=name):
            MLXTrainingArguments("o", **{name: value})


@pytest.mark.parametrize("weights", [[math.nan], [math.inf], [-1.0], [0.0], [], ["1"]])
def test_weights_of_files(weights, place):
    with pytest.raises(ValueError, match="weight"):
        pretrain([place / "a.fasta"], place / "o", (1, 8, 1), weights=weights)


@pytest.mark.parametrize("shape", [(0, 8, 1), (1, 7, 1), (1, 8, 0), (1, 8, 3), (-1, 8, 1), (10**30, 8, 1), (1.0, 8, 1)])
def test_shape_of_a_new_model(shape, place):
    with pytest.raises(ValueError, match="layers|hidden_size|heads"):
        pretrain([place / "a.fasta"], place / "o", shape)
