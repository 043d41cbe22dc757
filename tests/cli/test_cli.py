import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import EsmConfig, EsmModel
from typer.testing import CliRunner

from mlx_esm_hf import Esm1Tokenizer, EsmTokenizer, MLXEsm1Config, MLXEsmModel
from mlx_esm_hf.cli import app
from tests.vocabulary import write_vocabulary

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def esm1b(tmp_path_factory):
    """A tiny ESM-1b with room for 10 residues."""
    folder = tmp_path_factory.mktemp("esm1b")
    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=33, pad_token_id=1, mask_token_id=32, max_position_embeddings=14, initializer_range=0.3, **SMALL
    )
    EsmModel(config).save_pretrained(folder)
    EsmTokenizer(write_vocabulary(folder)).save_pretrained(folder)
    return folder


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
    assert json.loads(metadata["ids"]) == ["p0", "p1", "p2", "p0"]  # in order, a name that comes twice kept
    assert metadata["pooling"] == "mean"
    model = EsmModel.from_pretrained(esm1b).eval()
    tokenizer = EsmTokenizer.from_pretrained(esm1b)
    for row, sequence in zip(rows, sequences, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(sequence, return_tensors="pt")).last_hidden_state[0, 1:-1]
        np.testing.assert_allclose(row, states.mean(dim=0), atol=1e-5)


def test_embed_esm1_has_no_eos_to_leave_out(run, tmp_path):
    model = MLXEsmModel(MLXEsm1Config(**SMALL)).eval()
    model.save_pretrained(tmp_path / "esm1")
    Esm1Tokenizer().save_pretrained(tmp_path / "esm1")
    result, output = run(">a\nMKTAYI\n>b\nGGGG\n", tmp_path / "esm1")
    assert result.exit_code == 0, result.output
    states = model(input_ids=[Esm1Tokenizer()("MKTAYI")["input_ids"]]).last_hidden_state[0, 1:]
    np.testing.assert_allclose(means(output)[0][0], states.mean(axis=0), atol=1e-5)


@pytest.mark.parametrize(
    ("fasta", "message"),
    [
        (">a\nMKTJJJV\n", "'a' has letters that are no residues of this model, 'J'"),
        (">a\nMKT\n>long\nMKTAYIAKQRQ\n", "'long'.*10 residues"),
        ("", "holds no proteins"),
        ("MKT\n", "not FASTA"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(run, esm1b, fasta, message):
    result, output = run(fasta, esm1b)
    assert result.exit_code == 1
    assert re.search(message, result.output.replace("\n", " "))
    assert "Traceback" not in result.output
    assert not output.exists()


def test_model_that_is_nowhere(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result, _ = run(">a\nMKT\n", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "nowhere" in result.output


def test_env():
    command = [sys.executable, "-m", "mlx_esm_hf.cli", "env"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "100"})
    shown = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in done.stdout.splitlines())
    assert {"mlx-esm-hf", "mlx", "transformers", "device", "BLAS on the CPU"} <= shown.keys()
    gflops = int(shown["float32 matmul"].split()[0])
    if sys.platform == "linux" and "cpu" in shown["device"]:
        assert "reference" not in shown["BLAS on the CPU"]
        assert gflops > 10  # the reference BLAS reaches 2
