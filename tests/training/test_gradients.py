"""Gradients of models compared with torch, parameter by parameter."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten

import mlx_esm_hf
from tests.tiny import tiny

HEADS = ["ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"]


def batch(head, rng):
    """Return rows of several lengths with labels."""
    ids = rng.integers(4, 24, (6, 30))
    mask = np.arange(30) < np.array([[30], [4], [17], [30], [9], [22]])
    ids[:, 0], ids[~mask] = 0, 1
    labels = np.where(mask & (rng.random((6, 30)) < 0.4), rng.integers(4, 24, (6, 30)), -100)
    if head == "ForSequenceClassification":
        labels = rng.integers(0, 3, 6)
    elif head == "ForTokenClassification":
        labels = np.where(labels > 0, labels % 3, -100)
    else:
        ids = np.where(labels > 0, 32, ids)
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": labels}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["ESM-1b", "ESM-2"])
def test_every_parameter(family, head, checkpointing, tmp_path):
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    theirs = getattr(transformers, f"Esm{head}")(transformers.EsmConfig(**tiny(family, **off)))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    inputs = batch(head, np.random.default_rng(0))
    theirs.train()(**{name: torch.tensor(value) for name, value in inputs.items()}).loss.backward()

    ours = getattr(mlx_esm_hf, f"MLXEsm{head}").from_pretrained(tmp_path).train()
    if checkpointing:
        ours.gradient_checkpointing_enable()
    arrays = {name: mx.array(value) for name, value in inputs.items()}
    gradients = nn.value_and_grad(ours, lambda: ours(**arrays).loss)()[1]
    found = {name: np.array(value) for name, value in tree_flatten(gradients)}

    # The names are the same. Parameters without a gradient in torch (the contact head) have zeros here.
    expected = {
        name: np.zeros(tuple(p.shape)) if p.grad is None else p.grad.numpy() for name, p in theirs.named_parameters()
    }
    assert found.keys() == expected.keys()
    layers = {name.rpartition(".")[0] for name in expected}
    for layer in layers:
        names = [name for name in expected if name.rpartition(".")[0] == layer]
        norm = np.sqrt(sum(np.square(expected[name], dtype=np.float64).sum() for name in names))
        for name in names:
            assert np.linalg.norm(found[name] - expected[name]) <= 1e-4 * norm, name


def test_the_inverse_frequencies_are_not_trainable():
    model = mlx_esm_hf.MLXEsmForMaskedLM(mlx_esm_hf.MLXEsmConfig(**tiny("ESM-2")))
    model.train().unfreeze()
    assert not [name for name, _ in tree_flatten(model.trainable_parameters()) if "inv_freq" in name]
