"""Adapters on ESMC, compared with PEFT on transformers' ESMC, and saved and loaded in both directions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import mlx_esm_hf
from mlx_esm_hf.training.adapters import load_adapter, merge_adapters, save_adapter
from tests.models.esmc.peers import answers, chain_batch, hold_answers, torch_model
from tests.parity import HEADS, Peers, for_torch, hold, one_thread, true_float64
from tests.training.adapters.helpers import (
    KINDS,
    TASKS,
    arrays_of,
    close,
    mlx_gradients,
    randomize_adapters,
    torch_gradients,
)

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_head = pytest.mark.parametrize("head", ["lm", "token", "single_label"])


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


def base_model(folder: Path, head: str) -> Any:
    return getattr(mlx_esm_hf, f"MLXEsmc{HEADS[head][0]}").from_pretrained(folder / "base")


def adapted(folder: Path, head: str, kind: str) -> Peers:
    """Return a model with adapters that PEFT saved under `adapter`, and the same model loaded in MLX."""
    base = torch_model(head)
    base.save_pretrained(folder / "base")
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": TASKS.get(head)} | KINDS[kind]
    model = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    randomize_adapters(model)
    model.save_pretrained(folder / "adapter")
    ours = load_adapter(base_model(folder, head), folder / "adapter")
    return Peers(ours, model.base_model.model, copy.deepcopy(model.base_model.model).double())


@every_kind
@every_head
def test_outputs(tmp_path: Path, head: str, kind: str) -> None:
    model, inputs = adapted(tmp_path, head, kind), chain_batch(head)
    before = base_model(tmp_path, head)(**inputs).logits
    assert not close(model.mlx(**inputs).logits, before, 0.1)
    with true_float64():
        float64 = answers(model.float64, inputs)
    hold_answers(model, f"{type(model.mlx).__name__} adapted", inputs, answers(model.torch, inputs), float64)


@every_kind
@every_head
def test_gradients(tmp_path: Path, head: str, kind: str) -> None:
    """Only A, B, the magnitudes and the heads have gradients."""
    model, inputs = adapted(tmp_path, head, kind), chain_batch(head)
    ours, theirs = mlx_gradients(model.mlx, inputs), torch_gradients(model.torch, inputs)
    with true_float64():
        float64 = torch_gradients(model.float64, inputs)
    assert ours.keys() == theirs.keys() and any("lora_A" in name for name in ours)
    scale = max(np.abs(gradient).max() for gradient in float64.values())
    for name in theirs:
        trio = ours[name], theirs[name], float64[name]
        hold(type(model.mlx).__name__, "gradients", f"adapted {name}", *trio, scale=scale)


@every_kind
@every_head
def test_there_and_back(tmp_path: Path, head: str, kind: str) -> None:
    """PEFT loads the adapter that we save, with identical arrays and outputs."""
    model, inputs = adapted(tmp_path, head, kind), chain_batch(head)
    save_adapter(model.mlx, tmp_path / "ours")
    written, expected = arrays_of(tmp_path / "ours"), arrays_of(tmp_path / "adapter")
    assert written.keys() == expected.keys()
    assert all(np.array_equal(written[name], array) for name, array in expected.items())
    base = getattr(transformers, f"Esmc{HEADS[head][0]}").from_pretrained(tmp_path / "base").eval()
    base.set_attn_implementation("eager")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(**for_torch(inputs, base)).logits, model.torch(**for_torch(inputs, base)).logits)


@every_kind
def test_merged(tmp_path: Path, kind: str) -> None:
    """The merged model is an ordinary model that transformers loads."""
    model, inputs = adapted(tmp_path, "lm", kind), chain_batch("lm")
    merge_adapters(model.mlx).save_pretrained(tmp_path / "merged")
    theirs = transformers.EsmcForMaskedLM.from_pretrained(tmp_path / "merged").eval()
    theirs.set_attn_implementation("eager")
    real = inputs["sequence_id"] >= 0
    with torch.no_grad():
        expected = model.torch(**for_torch(inputs, theirs)).logits[real]
        assert close(theirs(**for_torch(inputs, theirs)).logits[real], expected)
    assert close(np.array(model.mlx(**inputs).logits)[real], expected)
