"""Resume interrupted trainings with a changed setting, input or file: they are refused by name, or end unchanged."""

import gzip
import json
import re
import shutil
import signal
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from mlx_esm_hf.cli import app
from tests.abuse.command import run
from tests.jobs.models import write_model

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


class Inputs:
    """The inputs of the trainings: models, tables and FASTA files, each also with changes."""

    def __init__(self, folder):
        self.folder = folder
        write_model(folder / "model", seed=0)
        write_model(folder / "weights", seed=1)
        write_model(folder / "family", "ESM-1b")
        shutil.copytree(folder / "model", folder / "renamed")
        shutil.copytree(folder / "model", folder / "config")
        config = json.loads((folder / "model" / "config.json").read_text())
        (folder / "config" / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-4}))
        rng = np.random.default_rng(0)
        sequences = ["".join(rng.choice(list(RESIDUES), rng.integers(8, 20))) for _ in range(48)]
        self._tables("classes", [[s, "KR"[s.count("K") + s.count("R") > 2]] for s in sequences], "K", "R")
        self._tables("numbers", [[s, f"{len(s) / 7:.3f}"] for s in sequences], "1.250", "1.251")
        letters = [[s, "".join("HE"[x in "KRDE"] for x in s)] for s in sequences]
        letters[2][1] = "-" * len(letters[2][0])  # no label
        self._tables("residues", letters, letters[0][1], letters[0][1].replace("H", "-", 1))
        self._fasta(sequences)

    def _tables(self, name, rows, value, other):
        """Write a table and its changes. In one of them, a label `value` becomes `other`."""
        rows[0][1] = value
        changed = {
            "": rows,
            "-label": [[rows[0][0], other], *rows[1:]],
            "-residue": [["W" + rows[0][0][1:], rows[0][1]], *rows[1:]],
            "-reversed": rows[::-1],
            "-swapped": [rows[1], rows[0], *rows[2:]],
            "-shorter": rows[:-1],
            "-longer": [*rows, rows[0]],
            "-validation": rows[:20],
        }
        for ending, lines in changed.items():
            self._write(f"{name}{ending}.csv", [["sequence", "label"], *lines])
        self._write(f"{name}-extra.csv", [["id", "sequence", "label"], *([str(i), *row] for i, row in enumerate(rows))])
        self._write(f"{name}-columns.csv", [["protein", "label", "sequence"], *([*row, row[0]] for row in rows)])
        self._write(f"{name}.tsv", [["sequence", "label"], *rows], "\t")
        text = (self.folder / f"{name}.csv").read_text()
        (self.folder / f"{name}-crlf.csv").write_text(text.replace("\n", "\r\n"), newline="")

    def _write(self, name, rows, delimiter=","):
        (self.folder / name).write_text("".join(delimiter.join(row) + "\n" for row in rows))

    def _fasta(self, sequences):
        records = [f">{i}\n{sequence}\n" for i, sequence in enumerate(sequences)]
        changed = {
            "": records,
            "-residue": [f">0\nW{sequences[0][1:]}\n", *records[1:]],
            "-reversed": records[::-1],
            "-shorter": records[:-1],
            "-longer": [*records, ">more\nMKTAYIAK\n"],
            "-ids": [record.replace(">", ">p") for record in records],
        }
        for ending, lines in changed.items():
            (self.folder / f"proteins{ending}.fasta").write_text("".join(lines))
        (self.folder / "proteins.fasta.gz").write_bytes(gzip.compress("".join(records).encode()))


FINETUNE = {"--model": "model", "--epochs": "2", "--learning-rate": "5e-3", "--keep": "2", "--quiet": None}
SMALL = {"--shape": "2,16,2", "--context": "16", "--batch-tokens": "128", "--validation-share": "0.2"}
SMALL |= {"--steps": "6", "--save-every": "3", "--evaluate-every": "3", "--quiet": None}
# {training: (command, inputs, options)}
TRAININGS = {
    "classification": ("finetune", ["classes.csv"], FINETUNE),
    "regression": ("finetune", ["numbers.csv"], FINETUNE | {"--task": "regression", "--train": "full"}),
    "residues": ("finetune", ["residues.csv"], FINETUNE | {"--task": "residues", "--train": "head"}),
    "pretraining": ("train", ["proteins.fasta"], SMALL),
}
DATA = ["-label", "-residue", "-reversed", "-swapped", "-shorter", "-longer"]


def table_changes(name):
    """Return {changed table: what the message names, or None if the training does not change}."""
    changes = {f"{name}{ending}.csv": "training data" for ending in DATA}
    return changes | dict.fromkeys([f"{name}-extra.csv", f"{name}-crlf.csv", f"{name}.tsv"])


OPTIMIZER = {
    ("--accumulate", "2"): "gradient_accumulation_steps: 1; now: 2",
    ("--steps", "7"): "max_steps",
    ("--learning-rate", "1e-4"): "learning_rate",
    ("--schedule", "cosine"): "lr_scheduler_type: linear; now: cosine",
    ("--warmup", "3"): "warmup_steps",
    ("--weight-decay", "0.3"): "weight_decay",
    ("--clip", "0.5"): "max_grad_norm",
    ("--bf16",): "bf16: False; now: True",
    ("--gradient-checkpointing",): "gradient_checkpointing: False; now: True",
    ("--seed", "1"): "seed: 0; now: 1",
    ("--keep", "5"): None,
    ("--log-every", "1"): None,
}
# {training: {option and value, or names of inputs: what the message names, or None if the training does not change}}
CHANGES = {
    "classification": OPTIMIZER
    | {
        ("--rank", "4"): "rank: 8; now: 4",
        ("--alpha", "64"): "alpha: 16.0; now: 64.0",
        ("--dropout", "0.3"): "dropout: 0.0; now: 0.3",
        ("--target-modules", "query"): "target_modules: query, key, value; now: query",
        ("--target-modules", "query,key"): "target_modules",
        ("--train", "dora"): "train: lora; now: dora",
        ("--train", "full"): "train: lora; now: full",
        ("--train", "head"): "train: lora; now: head",
        ("--merge",): "merge: False; now: True",
        ("--task", "residues"): "",  # every row is left out
        ("--task", "regression"): "",
        ("--epochs", "3"): "num_train_epochs: 2.0; now: 3.0",
        ("--batch-size", "4"): "per_device_train_batch_size: 8; now: 4",
        ("--metrics", "accuracy"): "metrics",
        ("--best", "accuracy"): "metric_for_best_model: eval_loss; now: eval_accuracy",
        ("--validation", "classes-validation.csv"): "validation data: classes.csv; now: classes-validation.csv",
        ("--validation-share", "0.4"): "validation_share: 0.1; now: 0.4",
        ("--sequence-column", "protein", "classes-columns.csv"): "sequence_column: sequence; now: protein",
        ("--model", "weights"): "model: ",
        ("--model", "family"): "model: ",
        ("--model", "config"): "layer_norm_eps: 1e-05; now: 0.0001",
        ("--model", "renamed"): None,
        ("--picture", "losses.png"): None,
    }
    | {(name,): message for name, message in table_changes("classes").items()},
    "regression": {(name,): message for name, message in table_changes("numbers").items()}
    | {("--rank", "4"): None, ("--train", "lora"): "train: full; now: lora", ("--model", "weights"): "model: "},
    "residues": {(name,): message for name, message in table_changes("residues").items()}
    | {("--alpha", "4"): None, ("--train", "full"): "train: head; now: full", ("--model", "weights"): "model: "},
    "pretraining": {change: message for change, message in OPTIMIZER.items() if change[0] != "--accumulate"}
    | {
        ("--accumulate", "2"): "gradient_accumulation_steps: 1; now: 2",
        ("--shape", "3,16,2"): "model: a new one of shape 2,16,2; now: a new one of shape 3,16,2",
        ("--shape", "2,32,2"): "model: ",
        ("--shape", "2,16,4"): "model: ",
        ("--context", "12"): "context: 16; now: 12",
        ("--batch-tokens", "96"): "batch_tokens: 128; now: 96",
        ("--weights", "2"): "weights: not set; now: 2.0",
        ("--validation-share", "0.1"): "validation_share: 0.2; now: 0.1",
        ("--validation", "proteins-shorter.fasta"): "validation data",
        ("--save-every", "2"): None,
        ("--evaluate-every", "2"): None,
        ("proteins-residue.fasta",): "training data: proteins.fasta; now: proteins-residue.fasta",
        ("proteins-reversed.fasta",): "training data",
        ("proteins-shorter.fasta",): "training data",
        ("proteins-longer.fasta",): "training data",
        ("proteins.fasta", "proteins-ids.fasta"): "training data: proteins.fasta; now: proteins.fasta, proteins-ids",
        ("proteins-ids.fasta",): None,
        ("proteins.fasta.gz",): None,
    },
}


def command(training, folder, output, change=()):
    """Return the arguments of a training, with a change: an option and its value, names of inputs, or both."""
    name, inputs, options = TRAININGS[training]
    change = list(change)
    if change and change[0].startswith("--"):
        option = change.pop(0)
        has_value = option not in ("--merge", "--bf16", "--gradient-checkpointing")
        options = options | {option: change.pop(0) if has_value else None}
    arguments = [name, *(str(folder / path) for path in change or inputs), "--output", str(output)]
    for option, value in options.items():
        is_file = option in ("--model", "--validation")
        is_picture = option == "--picture"
        path = str(output.parent / value) if is_picture else str(folder / value) if is_file else value
        arguments += [option] if value is None else [option, path]
    return arguments


def invoke(arguments):
    """Run a command in this process. Return its exit code and what it printed."""
    result = CliRunner(env={"COLUMNS": "1000"}).invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def outcome_of(output):
    """Return the files that a training has written, and its last evaluation, without names and times."""
    found = {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.is_file()}
    log = [json.loads(line) for line in found.pop("log.jsonl").splitlines()]
    if "adapter_config.json" in found:
        found["adapter_config.json"] = json.loads(found["adapter_config.json"])
        found["adapter_config.json"].pop("base_model_name_or_path")
    evaluation = next(line for line in reversed(log) if "eval_loss" in line)
    return found, {name: value for name, value in evaluation.items() if name != "eval_runtime"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module", params=TRAININGS)
def training(request, inputs, tmp_path_factory):
    """A training, its folder after a kill that followed its first checkpoint, and its undisturbed outcome."""
    folder = tmp_path_factory.mktemp(request.param)
    code, printed = invoke(command(request.param, inputs.folder, folder / "undisturbed"))
    assert code == 0, printed
    steps = sorted(int(path.name.partition("-")[2]) for path in (folder / "undisturbed").glob("checkpoint-*"))
    assert len(steps) == 2
    (folder / "killed").mkdir()
    arguments = command(request.param, inputs.folder, folder / "killed" / "out")
    kill = {"KILL_BEFORE": rf".*/\.checkpoint-{steps[1]}\..*"}
    code, printed = run([sys.executable, "-m", "tests.abuse.child", *arguments], env=kill)
    assert code == -signal.SIGKILL, printed
    assert [path.name for path in (folder / "killed" / "out").glob("checkpoint-*")] == [f"checkpoint-{steps[0]}"]
    return request.param, folder / "killed" / "out", outcome_of(folder / "undisturbed")


def summary(training, tries, refused, identical, wrong):
    print(f"\n{training}: {tries} tries, {refused} refused, {identical} identical, {len(wrong)} shortfalls")
    for line in wrong:
        print("   ", line)


@pytest.mark.long
def test_a_changed_setting_or_input_is_refused_by_name_or_changes_nothing(training, inputs, tmp_path):
    name, killed, expected = training
    refused, identical, wrong = 0, 0, []
    for number, (change, message) in enumerate({(): None, **CHANGES[name]}.items()):
        output = tmp_path / str(number) / "out"
        shutil.copytree(killed, output)
        try:
            code, printed = invoke(command(name, inputs.folder, output, change))
        except Exception as error:
            wrong.append((change, f"traceback: {error!r}"))
            continue
        if code == 0 and outcome_of(output) == expected:
            identical += 1
            if message is not None:
                wrong.append((change, "accepted, but should be refused"))
        elif code == 1 and message is not None and message in printed:
            refused += 1
        else:
            wrong.append((change, code, printed[-500:]))
    summary(name, len(CHANGES[name]) + 1, refused, identical, wrong)
    assert not wrong


def damages(path):
    """Return {name: function that damages a file}."""
    data = path.read_bytes()
    middle = len(data) // 2
    changed = {
        "empty": b"",
        "truncated": data[:middle],
        "one byte less": data[:-1],
        "longer": data + b"\0",
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else b"x",
        "first byte": bytes([data[0] ^ 8]) + data[1:] if data else b"x",
        "zeros": bytes(len(data)),
    }
    if path.suffix == ".json":
        changed |= {text: text.encode() for text in ("null", "[]", "{}", "1", '"text"')}

    def replace_by_folder(path):
        path.unlink()
        path.mkdir()

    writers = {kind: lambda path, text=text: path.write_bytes(text) for kind, text in changed.items() if text != data}
    return writers | {"removed": lambda path: path.unlink(), "folder": replace_by_folder}


@pytest.mark.long
def test_a_damaged_file_is_refused_by_name_or_changes_nothing(training, inputs, tmp_path):
    name, killed, expected = training
    if name in ("regression", "residues"):
        pytest.skip("the same files as those of the classification")
    tries, refused, identical, wrong = 0, 0, 0, []
    for file in sorted(path.relative_to(killed) for path in killed.rglob("*") if path.is_file()):
        for kind, damage in damages(killed / file).items():
            output = tmp_path / str(tries) / "out"
            shutil.copytree(killed, output)
            damage(output / file)
            tries += 1
            try:
                code, printed = invoke(command(name, inputs.folder, output))
                advised = re.search(r"Remove (\S+?)(?::|,| to resume)", printed)
                named = (output / file).parent if file.name == "checksums.txt" else output / file
                if code == 1 and str(named) in printed:
                    refused += 1
                    if kind != "removed" or not advised:
                        continue
                    shutil.rmtree(advised[1])
                    code, printed = invoke(command(name, inputs.folder, output))
                    if code != 0 or outcome_of(output) != expected:
                        wrong.append((str(file), kind, "after the advice", printed[-300:]))
                elif code == 0 and outcome_of(output) == expected:
                    identical += 1
                else:
                    wrong.append((str(file), kind, code, printed[-300:]))
            except Exception as error:
                wrong.append((str(file), kind, f"traceback: {error!r}"))
    summary(f"{name}, damaged files", tries, refused, identical, wrong)
    assert not wrong
