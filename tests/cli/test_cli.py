import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version

import mlx.core as mx
import numpy as np
import pytest
import torch
from Bio import SeqIO
from safetensors import safe_open
from transformers import EsmModel
from typer.testing import CliRunner

from mlx_esm_hf import Esm1Tokenizer, EsmTokenizer, MLXEsm1Config, MLXEsmModel, __version__, convert
from mlx_esm_hf.cli import app
from mlx_esm_hf.ops import kernels
from mlx_esm_hf.runtime import blas
from tests.jobs.models import write_model
from tests.processes import ENVIRONMENT, MAIN
from tests.tiny import SIZE


@pytest.fixture(scope="module")
def esm1b(tmp_path_factory):
    """A tiny ESM-1b with room for 10 residues."""
    return write_model(tmp_path_factory.mktemp("esm1b"), "ESM-1b", positions=14)


@pytest.fixture(scope="module")
def esm2(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("esm2"))


@pytest.fixture
def run(tmp_path):
    def run(fasta, model, *options):
        (tmp_path / "in.fasta").write_text(fasta)
        output = tmp_path / "out.safetensors"
        arguments = ["embed", tmp_path / "in.fasta", "--model", model, "--output", output, *options]
        return CliRunner().invoke(app, [str(a) for a in arguments]), output

    return run


def means(path):
    with safe_open(path, framework="numpy") as file:
        return file.get_tensor("mean"), file.metadata()


def test_embed_is_the_mean_over_residues(run, esm1b):
    sequences = ["MKT", "MKTAYIAKQR", "GG", "ACDEF"]
    result, output = run("".join(f">p{i % 3}\n{s}\n" for i, s in enumerate(sequences)), esm1b, "--batch-tokens", "20")
    assert result.exit_code == 0, result.output
    rows, metadata = means(output)
    assert json.loads(metadata["ids"]) == ["p0", "p1", "p2", "p0#2"]  # in input order
    assert json.loads(metadata["pooling"]) == ["mean"]
    model = EsmModel.from_pretrained(esm1b).eval()
    tokenizer = EsmTokenizer.from_pretrained(esm1b)
    for row, sequence in zip(rows, sequences, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(sequence, return_tensors="pt")).last_hidden_state[0, 1:-1]
        np.testing.assert_allclose(row, states.mean(dim=0), atol=1e-5)


def test_embed_esm1_without_eos(run, tmp_path):
    model = MLXEsmModel(MLXEsm1Config(**SIZE)).eval()
    model.save_pretrained(tmp_path / "esm1")
    Esm1Tokenizer().save_pretrained(tmp_path / "esm1")
    result, output = run(">a\nMKTAYI\n>b\nGGGG\n", tmp_path / "esm1")
    assert result.exit_code == 0, result.output
    states = model(input_ids=[Esm1Tokenizer()("MKTAYI")["input_ids"]]).last_hidden_state[0, 1:]
    np.testing.assert_allclose(means(output)[0][0], states.mean(axis=0), atol=1e-5)


def test_embed_esm1_in_a_fresh_process(tmp_path):
    """The tokenizer is found by the config's `model_type`, without an import by the user."""
    MLXEsmModel(MLXEsm1Config(**SIZE)).save_pretrained(tmp_path / "esm1")
    Esm1Tokenizer().save_pretrained(tmp_path / "esm1")
    (tmp_path / "in.fasta").write_text(">a\nMKTAYI\n")
    command = [sys.executable, "-m", "mlx_esm_hf", "embed", tmp_path / "in.fasta", "--model", tmp_path / "esm1"]
    done = subprocess.run([*command, "--output", tmp_path / "out.npz"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "LOAD REPORT" not in done.stderr


@pytest.mark.parametrize(
    ("fasta", "message"),
    [
        (">a\nMK3T\n", "contains no proteins.*line 1: 'a' has '3' at position 3"),
        (">a\nMKT\n>long\nMKTAYIAKQRQ\n", "'long' has 11 residues; .* accepts at most 10"),
        ("", "contains no proteins"),
        ("MKT\n", "not FASTA"),
    ],
)
def test_invalid_input_writes_nothing(run, esm1b, fasta, message):
    result, output = run(fasta, esm1b)
    assert result.exit_code == 1
    assert re.search(message, result.output.replace("\n", " "))
    assert "Traceback" not in result.output
    assert not output.exists()


def npz(path):
    """Return {name: shape} of the arrays."""
    with np.load(path) as file:
        return {name: file[name].shape for name in file.files}


def rows(path):
    """Return the header, and the id of each row."""
    with open(path, newline="") as file:
        header, *others = csv.reader(file)
    return header, [dict(zip(header, row, strict=True))["id"] for row in others]


def titles(path):
    """Return the ids of the records."""
    return [record.id for record in SeqIO.parse(path, "fasta")]


# Each job: output file, options, reader of the file, expected content.
JOBS = {
    "embed": ("out.npz", [], npz, {"ids": (2,), "mean": (2, SIZE["hidden_size"]), "metadata": ()}),
    "fill-mask": (
        "out.csv",
        ["--top-k", "2"],
        rows,
        (["number", "id", "position", "rank", "token", "score"], ["a", "a", "b", "b"]),
    ),
    "contacts": ("out.npz", [], npz, {"a": (6, 6), "b": (5, 5), "ids": (2,), "metadata": ()}),
    "perplexity": (
        "out.csv",
        [],
        rows,
        (["number", "id", "length", "one_pass_estimate", "pseudo_perplexity"], ["a", "b"]),
    ),
    "generate": ("out.fasta", ["--samples", "2"], titles, ["a_1", "a_2", "b_1", "b_2"]),
}


@pytest.mark.parametrize("name", JOBS)
def test_each_job_writes_its_file(esm2, tmp_path, name):
    (tmp_path / "in.fasta").write_text(">a\nMK<mask>AYI\n>b\nGGAC<mask>\n")
    output, options, read, expected = JOBS[name]
    arguments = [name, tmp_path / "in.fasta", "--model", esm2, "--output", tmp_path / output, *options]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert read(tmp_path / output) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.fasta", output]


@pytest.mark.parametrize("name", [*JOBS, "score"])
def test_config_output_flags_do_not_change_results(name, esm2, tmp_path):
    """Output flags in a config are for scripts; results of jobs are identical byte for byte."""
    model = tmp_path / "model"
    shutil.copytree(esm2, model)
    (tmp_path / "in.fasta").write_text(">a\nMK<mask>AYI\n>b\nGGAC<mask>\n")
    output, options = ("out.csv", []) if name == "score" else JOBS[name][:2]
    source = ["--sequence", "MKTAYI"] if name == "score" else [tmp_path / "in.fasta"]
    written = []
    for changes in ({}, {"return_dict": False, "output_attentions": True, "output_hidden_states": True}):
        config = json.loads((esm2 / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))
        arguments = [name, *source, "--model", model, "--output", tmp_path / output, *options]
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        written.append((tmp_path / output).read_bytes())
        (tmp_path / output).unlink()
    assert written[0] == written[1]


@pytest.mark.parametrize("name", [*JOBS, "score"])
def test_activation_dtype_needs_quantized_weights(name, esm2, tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nMK<mask>AYI\n")
    output, options = ("out.csv", []) if name == "score" else JOBS[name][:2]
    source = ["--sequence", "MKTAYI"] if name == "score" else [tmp_path / "in.fasta"]
    arguments = [name, *source, "--model", esm2, "--output", tmp_path / output, "--activation-dtype", "int8", *options]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 1 and not (tmp_path / output).exists()
    assert f"activation_dtype='int8' needs layers of 4 or 8 bits in mode 'affine', but {esm2} is not quantized" in (
        result.output.replace("\n", " ")
    )


def test_activation_dtype(run, esm2, tmp_path):
    """--activation-dtype gives the results of a checkpoint converted with it, and says so in the metadata."""
    spec = {"quantize": True, "bits": 8, "group_size": 32}
    convert(esm2, tmp_path / "weights", **spec)
    convert(esm2, tmp_path / "rounding", activation_dtype="int8", **spec)
    found, dtypes = [], []
    for model, *options in (("weights",), ("rounding",), ("weights", "--activation-dtype", "int8")):
        result, output = run(">a\nMKTAYIAKQR\n", tmp_path / model, *options)
        assert result.exit_code == 0, result.output
        embedding, metadata = means(output)
        found.append(embedding)
        dtypes.append(metadata.get("activation_dtype"))
        output.unlink()
    assert dtypes == [None, "int8", "int8"]
    plain, rounding, asked = found
    assert np.array_equal(asked, rounding) and not np.array_equal(asked, plain)


def test_score_writes_the_table(esm2, tmp_path):
    (tmp_path / "in.csv").write_text("mutant\nM1A\nA1M\n")
    arguments = ["score", tmp_path / "in.csv", "--sequence", "MKTAYI", "--model", esm2, "--output", tmp_path / "o.csv"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 3, result.output
    assert "row 2: A1M: the sequence has M at 1, not A" in result.output
    lines = (tmp_path / "o.csv").read_text().splitlines()
    assert lines[0] == f"mutant,{esm2}" and lines[1].startswith("M1A,") and lines[2] == "A1M,"


@pytest.mark.parametrize("name", [*JOBS, "score"])
def test_help_has_an_example(name):
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0 and f"mlx-esm {name}" in result.output.replace("\n", " ")


def test_changes_are_reported(run, esm1b):
    result, _ = run(">a\nmkjjt\n>b\nM-K\n>c\n\n", esm1b)
    assert result.exit_code == 3
    output = result.output.replace("\n", " ")
    for said in ("2 letters outside the alphabet", "1 gaps were dropped", "'c' is empty"):
        assert said in output
    strict, _ = run(">c\n\n", esm1b, "--strict")
    assert strict.exit_code == 1


def test_quiet_prints_nothing(run, esm1b):
    result, output = run(">a\nMKT\n", esm1b, "--quiet")
    assert (result.exit_code, result.output) == (0, "") and output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "x"], "--layers must be a comma-separated list of integers"),
        (
            ["--pooling", "sum"],
            "pooling must be any of mean, cls, max, residues, chains, spans, mean_tokens, max_tokens, got sum",
        ),
        (["--batch-tokens", "many"], "--batch-tokens must be auto or a positive integer"),
        (["--long", "cut"], "long must be one of error, truncate, window, got 'cut'"),
        (["--device", "tpu"], "device must be one of cpu, gpu, got 'tpu'"),
    ],
)
def test_invalid_options(run, esm1b, options, message):
    result, output = run(">a\nMKT\n", esm1b, *options)
    assert result.exit_code == 1 and not output.exists()
    assert message in result.output.replace("\n", " ")


def test_missing_model(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result, _ = run(">a\nMKT\n", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "nowhere" in result.output


def test_env():
    command = [sys.executable, "-m", "mlx_esm_hf", "env"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "100"})
    shown = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in done.stdout.splitlines())
    assert shown["mlx-esm-hf"] == __version__ and shown["mlx"] == version("mlx")
    assert shown["device"] == str(mx.default_device())
    assert shown["CPU kernels"] == kernels.STATE
    assert shown["CPU BLAS"] == blas.bind()
    assert re.fullmatch(r"\d+ GFLOP/s", shown["float32 matmul"])


def test_folders_of_outputs_are_created(esm2, tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nMKTAYIAKQR\n")
    new = tmp_path / "new"
    for arguments, files in (
        (["contacts", tmp_path / "in.fasta", "-o", new / "1/c.npz", "--top", new / "2/t.csv"], ["1/c.npz", "2/t.csv"]),
        (["score", "--sequence", "MKT", "-o", new / "3/s.csv", "--picture", new / "4/s.png"], ["3/s.csv", "4/s.png"]),
        (["embed", tmp_path / "in.fasta", "-o", new / "5/6/shards"], ["5/6/shards/index.csv"]),
    ):
        result = CliRunner().invoke(app, [str(a) for a in (*arguments, "-m", esm2)])
        assert result.exit_code == 0, result.output
        assert all((new / name).is_file() for name in files)
    (tmp_path / "file").touch()
    result = CliRunner().invoke(
        app, ["embed", str(tmp_path / "in.fasta"), "-m", str(esm2), "-o", str(tmp_path / "file/out.npz")]
    )
    assert result.exit_code == 1 and "is not a folder" in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [(["embd"], "Did you mean 'embed'?"), (["embed", "x", "--modle", "y"], "Possible options: --model")],
)
def test_misspelt_words_get_a_suggestion(words, suggestion):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and suggestion in " ".join(result.output.split())


@pytest.mark.parametrize("name", [command.name for command in app.registered_commands if command.name != "env"])
def test_command_without_arguments_says_what_is_missing(name):
    result = CliRunner().invoke(app, [name], prog_name="mlx-esm")
    assert result.exit_code == 2 and "Missing" in result.output and f"mlx-esm {name} --help" in result.output
    assert len(result.output.splitlines()) < 10


# Completes the words as bash does when Tab is pressed.
COMPLETE = """
export PATH="$PWD:$PATH"
eval "$(_MLX_ESM_COMPLETE=source_bash mlx-esm)"
COMP_WORDS=(mlx-esm "$@"); COMP_CWORD=$#
_mlx_esm_completion mlx-esm
echo "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands(tmp_path):
    shim = tmp_path / "mlx-esm"
    shim.write_text(f'#!/bin/sh\nexec {shlex.join(MAIN)} "$@"\n')
    shim.chmod(0o755)
    bash = ["bash", "-c", COMPLETE, "bash", "pe"]
    done = subprocess.run(bash, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout.split() == ["perplexity"], done.stderr


@pytest.mark.parametrize("umask", [0o027, 0o077])
def test_modes_follow_the_umask(umask, esm2, tmp_path):
    """All files of all commands, while they are shards and when they are finished."""
    fasta, table, out = tmp_path / "in.fasta", tmp_path / "in.csv", tmp_path / "out"
    sequences = [f"MKTAYI{residue}{other}" for residue in "ACDE" for other in "FGHI"]
    fasta.write_text("".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
    (tmp_path / "masked.fasta").write_text(">p\nMKT<mask>A\n")
    table.write_text("sequence,label\n" + "".join(f"{x},{'ab'[i % 2]}\n" for i, x in enumerate(sequences)))
    masked, scan = tmp_path / "masked.fasta", ("score", "--sequence", "MKTAY", "--output")
    commands = [
        *(("embed", fasta, "--output", out / f"e{end}") for end in (".h5", ".npz", ".parquet", ".safetensors", "")),
        (*scan, out / "s.csv", "--picture", out / "s.png"),
        ("contacts", fasta, "--output", out / "c.npz", "--top", out / "c.csv"),
        ("perplexity", fasta, "--output", out / "p.csv"),
        ("fill-mask", masked, "--output", out / "f.csv"),
        ("generate", masked, "--output", out / "g.fasta"),
        ("finetune", table, "--epochs", "1", "--output", out / "t"),
    ]
    if umask == 0o027:
        commands += [
            (
                "train",
                fasta,
                "--steps",
                "1",
                "--validation-share",
                "0.3",
                "--output",
                out / "m",
                "--picture",
                out / "m.png",
            )
        ]
    earlier = os.umask(umask)
    try:
        out.mkdir()
        for command in commands:
            result = CliRunner().invoke(app, [*map(str, command), "--model", str(esm2), "--quiet"])
            assert result.exit_code == 0, result.output
        convert(str(esm2), out / "v" / "v", quantize=True, bits=8, group_size=32)
    finally:
        os.umask(earlier)
    modes = {path: path.stat().st_mode & 0o777 for path in out.rglob("*")}
    wrong = {p: oct(mode) for p, mode in modes.items() if mode != (0o777 if p.is_dir() else 0o666) & ~umask}
    assert not wrong and len(modes) > 30
