"""Adapted models in PEFT and here, shared by the tests of adapters."""

import copy
import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peft
import pytest
import torch
import transformers
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

import mlx_esm_hf
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.training.adapters import LoraConfig, LoRALinear, add_adapters, load_adapter
from tests.parity import HEADS, Peers, answers, batch, config, for_torch, hold_all, randomize, true_float64

TARGETS = ["query", "value", "dense"]
KINDS = {"LoRA": {}, "DoRA": {"use_dora": True}}
MODELS = [("ESM-2", "lm"), ("ESM-1b", "single_label"), ("ESM-1v", "token")]
TASKS = {"single_label": "SEQ_CLS", "token": "TOKEN_CLS"}


def randomize_adapters(model: Any) -> None:
    """Set the adapters of a PEFT model to random values, as if they had been trained."""
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=random)
            parameter.data *= 1 + 0.3 * noise
            if "lora_B" in name:
                parameter.data = 0.2 * noise


def base_model(folder: Any, family: str, head: str, **overrides: Any) -> Any:
    """Save a random model of transformers in a folder and return it."""
    model = getattr(transformers, f"Esm{HEADS[head][0]}")(config(family, head, **overrides)).eval()
    model.set_attn_implementation("eager")
    randomize(model, seed=1)
    model.save_pretrained(folder)
    return model


def our_base(folder: Any, head: str) -> Any:
    return getattr(mlx_esm_hf, f"MLXEsm{HEADS[head][0]}").from_pretrained(folder)


def peers(folder: Any, family: str, head: str, **settings: Any) -> Peers:
    """Return a PEFT model, which it saves as `folder / "adapter"`, and the same model loaded here."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": TASKS.get(head)} | settings
    model = peft.get_peft_model(base_model(folder / "base", family, head), peft.LoraConfig(**settings)).eval()
    randomize_adapters(model)
    model.save_pretrained(folder / "adapter")
    ours = load_adapter(our_base(folder / "base", head), folder / "adapter")
    return Peers(ours, model.base_model.model, copy.deepcopy(model.base_model.model).double())


def hold_outputs(model: Peers, family: str, inputs: dict[str, Any]) -> None:
    with true_float64():
        float64 = answers(model.float64, inputs)
    hold_all(model, f"{family} adapted", inputs, answers(model.torch, inputs), ("", float64))


def arrays_of(folder: Any) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def shapes_of(folder: Any) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays_of(folder).items()}


def config_of(folder: Any) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def logits(model: Any, head: str = "lm") -> np.ndarray:
    return np.array(model(**batch(head=head)).logits)


def close(a: Any, b: Any, tolerance: float = 1e-5) -> bool:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


def mlx_gradients(model: Any, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    model.train()
    gradients = nn.value_and_grad(model, lambda: model(**inputs).loss)()[1]
    return {name: np.array(gradient) for name, gradient in tree_flatten(gradients)}


def torch_gradients(model: Any, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    model.train()
    model(**for_torch(inputs, model)).loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return {our_name(name): gradient for name, gradient in gradients.items()}


def our_name(name: str) -> str:
    name = name.replace(".default", "").replace(".modules_to_save", "")
    return name.removesuffix(".weight") if "magnitude" in name else name


def our_base_with(folder: Any, lora: LoraConfig, head: str = "lm", **overrides: Any) -> Any:
    """Return one of our models with adapters that are not zero."""
    base_model(folder / "base", "ESM-2", head, **overrides)
    mx.random.seed(0)
    model = add_adapters(our_base(folder / "base", head), lora)
    for _, module in model.named_modules():
        if isinstance(module, LoRALinear):
            module.lora_B.weight = 0.2 * mx.random.normal(module.lora_B.weight.shape)
    return model


def set_in_config(folder: Any, **settings: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | settings))


def assert_refused(folder: Any, message: str) -> None:
    """Assert that loading an adapter fails and leaves the model unchanged."""
    model = our_base(folder.parent / "base", "lm")
    before, trainable = logits(model), dict(tree_flatten(model.trainable_parameters())).keys()
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, folder)
    assert np.array_equal(logits(model), before)
    assert dict(tree_flatten(model.trainable_parameters())).keys() == trainable
    assert not any(isinstance(module, LoRALinear) for _, module in model.named_modules())
