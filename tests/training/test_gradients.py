"""Gradients of models compared with torch, parameter by parameter."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten, tree_map

import mlx_esm_hf
from mlx_esm_hf.training.adapters import LoraConfig, add_adapters
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


@pytest.mark.parametrize("adapters", [False, True], ids=["model", "adapters"])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_recomputed_layers_drop_the_same_elements(compiled, adapters):
    """With dropout, the gradient belongs to the loss: it predicts how the loss changes along it."""
    off = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    model = mlx_esm_hf.MLXEsmForMaskedLM(mlx_esm_hf.MLXEsmConfig(**tiny("ESM-2", **off)))
    if adapters:
        add_adapters(model, LoraConfig(r=4, lora_dropout=0.4))
    model.update(tree_map(lambda x: mx.random.normal(x.shape, scale=0.1), model.trainable_parameters()))
    model.train().gradient_checkpointing_enable()
    inputs = {name: mx.array(value) for name, value in batch("ForMaskedLM", np.random.default_rng(0)).items()}

    def loss():
        return model(**inputs).loss

    gradient_of, state = nn.value_and_grad(model, loss), [model.state, mx.random.state]
    if compiled:
        gradient_of = mx.compile(gradient_of, inputs=[state], outputs=[state])
    mx.random.seed(7)
    _, gradients = gradient_of()
    norm = mx.sqrt(sum(mx.square(x).sum() for _, x in tree_flatten(gradients))).item()
    start = model.trainable_parameters()

    def loss_at(step):
        model.update(tree_map(lambda x, g: x + step / norm * g, start, gradients))
        mx.random.seed(7)
        return loss().item()

    assert (loss_at(0.01) - loss_at(-0.01)) / 0.02 == pytest.approx(norm, rel=0.02)


def test_the_config_turns_checkpointing_on():
    config = mlx_esm_hf.MLXEsmConfig(**tiny("ESM-2"), gradient_checkpointing=True)
    assert mlx_esm_hf.MLXEsmForMaskedLM(config).is_gradient_checkpointing
    model = mlx_esm_hf.MLXEsmForMaskedLM(mlx_esm_hf.MLXEsmConfig(**tiny("ESM-2")))
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
