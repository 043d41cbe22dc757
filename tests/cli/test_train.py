"""`mlx-esm train` and `mlx-esm finetune`, from files to a model that other commands load."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import peft
import pytest
import transformers
from safetensors.numpy import load_file
from typer.testing import CliRunner

from mlx_esm_hf import MLXEsmForSequenceClassification, load_adapter
from mlx_esm_hf.cli import app
from tests.jobs.models import write_model
from tests.processes import ON_TWO_RANKS, ROOT

PROTEINS = str(ROOT / "examples" / "proteins.fasta")
SMALL = ["--shape", "2,32,4", "--context", "64", "--batch-tokens", "1024", "--log-every", "1", "--quiet"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_non_finite_loss_prints_one_line(tmp_path):
    options = ["--steps", 9, "--learning-rate", 1e30, "--warmup", 0, "--output", tmp_path / "out"]
    result = invoke("train", PROTEINS, *SMALL, *options)
    assert result.exit_code == 1
    assert re.match(r"Error: Step \d+: the loss is (nan|inf)", result.stderr), result.output


def test_train_continue_and_embed(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    picture = tmp_path / "losses.png"
    options = ["--steps", 20, "--validation-share", 0.1, "--evaluate-every", 10, "--learning-rate", 3e-3]
    result = invoke("train", PROTEINS, *SMALL, *options, "--picture", picture, "--output", first)
    assert result.exit_code == 0, result.output
    losses = [line["loss"] for line in log_of(first) if "loss" in line]
    evaluated = [line["eval_loss"] for line in log_of(first) if "eval_loss" in line]
    assert len(losses) == 20 and len(evaluated) == 2
    assert evaluated[-1] < evaluated[0] < math.log(33) + 0.1
    assert picture.read_bytes()[:4] == b"\x89PNG"
    config = transformers.EsmForMaskedLM.from_pretrained(first).config
    assert (config.num_hidden_layers, config.hidden_size, config.position_embedding_type) == (2, 32, "rotary")

    files = [PROTEINS, PROTEINS, "--weights", "3,1", "--validation", PROTEINS]
    result = invoke("train", *files, "--model", first, *SMALL[2:], "--steps", 2, "--output", second)
    assert result.exit_code == 0, result.output
    further = [line["loss"] for line in log_of(second) if "loss" in line]
    assert further[0] < losses[0] - 0.1

    output = tmp_path / "out.safetensors"
    result = invoke("embed", PROTEINS, "--model", second, "--output", output, "--quiet")
    assert result.exit_code == 0, result.output
    assert load_file(output)["mean"].shape == (100, 32)


def test_killed_training_resumes(tmp_path):
    command = [sys.executable, "-m", "mlx_esm_hf", "train", PROTEINS, *SMALL, "--steps", "12", "--save-every", "2"]
    expected, folder = tmp_path / "expected", tmp_path / "out"
    subprocess.run([*command, "--output", expected], cwd=ROOT, check=True)
    process = subprocess.Popen([*command, "--output", folder], cwd=ROOT)
    while process.poll() is None and not (folder / "checkpoint-4").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "--output", folder], cwd=ROOT, check=True)
    assert [line.get("loss") for line in log_of(folder)] == [line.get("loss") for line in log_of(expected)]
    found, wanted = (load_file(path / "model.safetensors") for path in (folder, expected))
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(expected))


def test_two_ranks_train_like_one(tmp_path):
    options = [*SMALL, "--steps", "4", "--validation-share", "0.1", "--evaluate-every", "2"]
    result = invoke("train", PROTEINS, *options, "--accumulate", 2, "--output", tmp_path / "one")
    assert result.exit_code == 0, result.output
    command = [sys.executable, "-m", "mlx_esm_hf", "train", PROTEINS, *options, "--output", tmp_path / "two"]
    subprocess.run([*ON_TWO_RANKS, *command], cwd=ROOT, check=True, timeout=300)
    one, two = (
        [line.get("loss", line.get("eval_loss")) for line in log_of(tmp_path / n) if "train_runtime" not in line]
        for n in ("one", "two")
    )
    assert len(one) == 6
    assert np.abs(np.subtract(one, two)).max() < 1e-5
    assert (tmp_path / "two" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([PROTEINS], "Give `--model` to continue training a model or `--shape` for a new one, not both."),
        ([PROTEINS, "--shape", "2,32"], "--shape must be three positive integers"),
        ([PROTEINS, "--shape", "2,30,4"], "a multiple of twice the number of heads"),
        ([PROTEINS, "--shape", "2,32,4", "--weights", "1,2"], "for each of the 1 files, not all of them 0, got"),
        (["nowhere.fasta", "--shape", "2,32,4"], "File not found: nowhere.fasta."),
        ([PROTEINS, "--shape", "2,32,4", "--schedule", "wave"], "must be one of linear, cosine"),
        ([PROTEINS, "--shape", "2,32,4", "--validation-share", "1"], "'--validation-share'"),
        ([PROTEINS, "--shape", "2,32,4", "--picture", "a.txt"], "a.txt: can't draw `.txt`. Use .png, .svg or .pdf."),
    ],
)
def test_invalid_training_is_one_message(arguments, message, tmp_path):
    result = invoke("train", *arguments, "--output", tmp_path / "out", "--quiet")
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())


def test_output_folder_in_use(tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    result = invoke("train", PROTEINS, *SMALL, "--steps", 1, "--output", tmp_path)
    assert result.exit_code == 1
    assert "already exists and is not a training" in " ".join(result.output.split())
    result = invoke("train", PROTEINS, *SMALL, "--steps", 1, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    again = invoke("train", PROTEINS, *SMALL, "--steps", 1, "--output", tmp_path / "out")
    assert again.exit_code == 1
    assert "already contains a model" in again.output.replace("\n", " ")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Write peptides whose class, more K and R than D and E, follows from their composition."""
    rng, lines = np.random.default_rng(0), []
    for _ in range(160):
        sequence = "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), rng.integers(8, 20)))
        charge = sum(sequence.count(x) for x in "KR") - sum(sequence.count(x) for x in "DE")
        lines.append(f"{sequence},{'positive' if charge > 0 else 'other'},{charge}\n")
    path = tmp_path_factory.mktemp("table") / "peptides.csv"
    path.write_text("sequence,label,charge\n" + "".join(lines))
    return path


@pytest.mark.parametrize("train", ["lora", "dora", "full", "head"])
def test_finetune_each_method(train, table, tmp_path):
    base = write_model(tmp_path / "base")
    options = [
        "--train",
        train,
        "--epochs",
        6,
        "--learning-rate",
        5e-3,
        "--metrics",
        "accuracy,roc_auc",
        "--best",
        "roc_auc",
    ]
    result = invoke("finetune", table, "--model", base, *options, "--output", tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    evaluated = [line for line in log_of(tmp_path / "out") if "eval_loss" in line]
    assert len(evaluated) == 7  # after each epoch, and for the best model
    assert evaluated[-1]["eval_roc_auc"] == max(line["eval_roc_auc"] for line in evaluated[:-1])
    if train in ("lora", "dora"):
        model = MLXEsmForSequenceClassification.from_pretrained(base, num_labels=2)
        load_adapter(model, tmp_path / "out")
        theirs = transformers.EsmForSequenceClassification.from_pretrained(base, num_labels=2)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out")
    else:
        model = MLXEsmForSequenceClassification.from_pretrained(tmp_path / "out")
        theirs = transformers.EsmForSequenceClassification.from_pretrained(tmp_path / "out")
        assert model.config.id2label == {0: "other", 1: "positive"}
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("MKTKKR", return_tensors="pt")
    expected = theirs.eval()(**inputs).logits.detach().numpy()
    assert np.abs(np.array(model.eval()(**inputs).logits) - expected).max() < 1e-4


def test_finetune_merged(table, tmp_path):
    base = write_model(tmp_path / "base")
    result = invoke(
        "finetune", table, "--model", base, "--merge", "--epochs", 1, "--output", tmp_path / "out", "--quiet"
    )
    assert result.exit_code == 0, result.output
    assert "model.safetensors" in os.listdir(tmp_path / "out")
    assert MLXEsmForSequenceClassification.from_pretrained(tmp_path / "out").num_labels == 2


def test_finetune_numbers_and_residues(table, tmp_path):
    base = write_model(tmp_path / "base")
    numbers = ["--task", "regression", "--label-column", "charge", "--epochs", 2]
    result = invoke("finetune", table, "--model", base, *numbers, "--output", tmp_path / "numbers", "--quiet")
    assert result.exit_code == 0, result.output
    assert {"eval_spearman", "eval_root_mean_squared_error"} < log_of(tmp_path / "numbers")[-1].keys()

    lines = [line.split(",")[0] for line in table.read_text().splitlines()[1:]]
    letters = tmp_path / "residues.csv"
    labelled = [f"{text},{''.join('+' if x in 'KR' else 'o' for x in text)}\n" for text in lines]
    letters.write_text("sequence,label\n" + "".join(labelled))
    options = ["--task", "residues", "--epochs", 4, "--learning-rate", 1e-2]
    result = invoke("finetune", letters, "--model", base, *options, "--output", tmp_path / "residues", "--quiet")
    assert result.exit_code == 0, result.output
    assert log_of(tmp_path / "residues")[-1]["eval_matthews_corrcoef"] > 0.9  # the label follows from the residue
