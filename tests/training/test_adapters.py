"""Adapters, with PEFT as the oracle: the same A, B and W give the same outputs, gradients, files and merged weights."""

import copy
import dataclasses
import json
import logging
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import peft
import pytest
import torch
import transformers
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

import mlx_esm_hf
from mlx_esm_hf.errors import CheckpointError
from mlx_esm_hf.modeling_layers import Linear, QuantizedLinear
from mlx_esm_hf.ops import cpu, dispatch
from mlx_esm_hf.training import adapters
from mlx_esm_hf.training.adapters import (
    IGNORED_FIELDS,
    REFUSED,
    LoraConfig,
    LoRALinear,
    add_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from tests import hub
from tests.models.test_third_family import ToyConfig, ToyModel
from tests.parity import (
    HEADS,
    Peers,
    answers,
    batch,
    config,
    for_torch,
    hold,
    hold_all,
    one_thread,
    randomize,
    true_float64,
)

TARGETS = ["query", "value", "dense"]
KINDS = {"LoRA": {}, "DoRA": {"use_dora": True}}
MODELS = [("ESM-2", "lm"), ("ESM-1b", "single_label"), ("ESM-1v", "token")]
TASKS = {"single_label": "SEQ_CLS", "token": "TOKEN_CLS"}


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(params=["this device", "without kernels"])
def backend(request, monkeypatch):
    if request.param == "without kernels":
        monkeypatch.setattr(dispatch, "backend_of", lambda *arrays: cpu)


def train_by_chance(model: Any) -> None:
    """Let a PEFT model's adapters be what training could have made of them."""
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=random)
            parameter.data *= 1 + 0.3 * noise
            if "lora_B" in name:
                parameter.data = 0.2 * noise


def base_model(folder: Any, family: str, head: str, **overrides: Any) -> Any:
    """A model of transformers, which is saved in a folder."""
    model = getattr(transformers, f"Esm{HEADS[head][0]}")(config(family, head, **overrides)).eval()
    model.set_attn_implementation("eager")
    randomize(model, seed=1)
    model.save_pretrained(folder)
    return model


def our_base(folder: Any, head: str) -> Any:
    return getattr(mlx_esm_hf, f"MLXEsm{HEADS[head][0]}").from_pretrained(folder)


def peers(folder: Any, family: str, head: str, **settings: Any) -> Peers:
    """A model with adapters in PEFT, that it has saved under `adapter`, and the same loaded here."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": TASKS.get(head)} | settings
    model = peft.get_peft_model(base_model(folder / "base", family, head), peft.LoraConfig(**settings)).eval()
    train_by_chance(model)
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


# PEFT's numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "head"), MODELS)
def test_outputs(backend, tmp_path, family, head, kind):
    model = peers(tmp_path, family, head, **KINDS[kind])
    assert not close(logits(model.mlx, head), logits(our_base(tmp_path / "base", head), head), 0.1)
    hold_outputs(model, family, batch(head=head))


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "head"), MODELS)
def test_gradients(backend, tmp_path, family, head, kind):
    """Of A, B, the magnitudes and the modules to save, against autograd; of nothing else."""
    model, inputs = peers(tmp_path, family, head, **KINDS[kind]), batch(head=head)
    ours, theirs = mlx_gradients(model.mlx, inputs), torch_gradients(model.torch, inputs)
    with true_float64():
        float64 = torch_gradients(model.float64, inputs)
    assert ours.keys() == theirs.keys() and any("lora_A" in name for name in ours)
    assert any("magnitude" in name for name in ours) == (kind == "DoRA")
    assert any("classifier" in name for name in ours) == (head != "lm")
    # A gradient may be as small as it likes beside the others, out of whose numbers it is made.
    scale = max(np.abs(gradient).max() for gradient in float64.values())
    for name in theirs:
        trio = ours[name], theirs[name], float64[name]
        hold(type(model.mlx).__name__, "gradients", f"{family} {name}", *trio, scale=scale)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*layer\.[01]\.attention\.self\.(query|key)"},
        {"target_modules": ["esm.encoder.layer.1.attention.self.value", "intermediate.dense"]},
        {"rank_pattern": {"value": 2, r"layer\.1\.output\.dense": 7}, "alpha_pattern": {"query": 3}},
        {"use_rslora": True, "rank_pattern": {"dense": 9}},
        {"modules_to_save": ["emb_layer_norm_after", "contact_head"]},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_settings(tmp_path, settings):
    """PEFT and `add_adapters` understand a config alike, and what PEFT makes of it loads."""
    model = peers(tmp_path, "ESM-2", "lm", **settings)
    hold_outputs(model, "ESM-2", batch(head="lm"))
    ours = add_adapters(our_base(tmp_path / "base", "lm"), LoraConfig(**{"r": 4, "target_modules": TARGETS} | settings))
    save_adapter(ours, tmp_path / "ours")
    assert shapes_of(tmp_path / "ours") == shapes_of(tmp_path / "adapter")


def fixed_dropout(p: float = 0.5) -> tuple[np.ndarray, float]:
    """Which of [3, 7, 24] numbers are kept, and what the kept are multiplied with."""
    return np.random.default_rng(0).random((3, 7, 24)) > p, 1 / (1 - p)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_dropout(backend, kind, bias):
    """In training, with the same numbers dropped: only the adapter misses them, in the output and in the gradients."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 16, bias=bias)
    ours = Linear(24, 16, bias=bias)
    ours.update({name: mx.array(p.detach().numpy()) for name, p in linear.named_parameters()})
    settings = {"r": 4, "lora_dropout": 0.5, **KINDS[kind]}
    model = peft.get_peft_model(torch.nn.Sequential(linear), peft.LoraConfig(target_modules=["0"], **settings))
    train_by_chance(model)
    layer = LoRALinear(ours, LoraConfig(**settings))
    theirs = model.base_model.model[0]
    layer.lora_A.weight = mx.array(theirs.lora_A["default"].weight.detach().numpy())
    layer.lora_B.weight = mx.array(theirs.lora_B["default"].weight.detach().numpy())
    if kind == "DoRA":
        layer.lora_magnitude_vector = mx.array(theirs.lora_magnitude_vector["default"].weight.detach().numpy())
    x = np.random.default_rng(1).normal(size=(3, 7, 24)).astype(np.float32)
    assert close(layer.eval()(mx.array(x)), theirs.eval()(torch.tensor(x)).detach())

    kept, factor = fixed_dropout()

    class Dropout(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.tensor(kept) * factor

    theirs.lora_dropout["default"] = Dropout()
    theirs.train()
    layer.train()
    layer.lora_dropout = lambda x: x * mx.array(kept) * factor
    layer.base_layer.freeze()

    x_torch = torch.tensor(x, requires_grad=True)
    y = theirs(x_torch)
    (y * y).sum().backward()
    assert close(layer(mx.array(x)), y.detach())
    loss = lambda parameters, x: mx.square(layer.update(parameters)(x)).sum()  # noqa: E731
    parameters = layer.trainable_parameters()
    gradients, gradient_of_x = mx.grad(loss, argnums=(0, 1))(parameters, mx.array(x))
    assert close(gradient_of_x, x_torch.grad)
    wanted = {our_name(name): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = dict(tree_flatten(gradients))
    assert found.keys() == wanted.keys()
    assert all(close(found[name], wanted[name]) for name in wanted)


def test_dropout_only_in_training(tmp_path):
    model = our_base_with(tmp_path, LoraConfig(lora_dropout=0.5))
    inputs = mx.array(batch("none")["input_ids"])
    still = np.array(model(inputs).logits)
    assert np.array_equal(still, model(inputs).logits)
    model.train()
    assert not np.array_equal(model(inputs).logits, model(inputs).logits)
    model.eval()
    assert np.array_equal(still, model(inputs).logits)


def our_base_with(folder: Any, lora: LoraConfig, head: str = "lm", **overrides: Any) -> Any:
    """A model here whose adapters are not zero."""
    base_model(folder / "base", "ESM-2", head, **overrides)
    mx.random.seed(0)
    model = add_adapters(our_base(folder / "base", head), lora)
    for _, module in model.named_modules():
        if isinstance(module, LoRALinear):
            module.lora_B.weight = 0.2 * mx.random.normal(module.lora_B.weight.shape)
    return model


# The layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer(backend, bias, quantized, activation, kind):
    """It takes what the networks give a `Linear`, and is the `Linear` of the weight that it says it has."""
    mx.random.seed(0)
    base = Linear(64, 96, bias=bias)
    layer = LoRALinear(base.to_quantized(32, 8) if quantized else base, LoraConfig(r=3, **KINDS[kind]))
    layer.lora_B.weight = 0.3 * mx.random.normal((96, 3))
    if kind == "DoRA":
        layer.lora_magnitude_vector = layer.lora_magnitude_vector * (1 + 0.3 * mx.random.normal((96,)))
    x, residual = mx.random.normal((2, 5, 64)), mx.random.normal((2, 5, 96))
    plain = Linear(64, 96, bias=bias)
    plain.update({"weight": layer.weight} | ({"bias": layer.bias} if bias else {}))
    assert not close(base(x), plain(x), 0.1)
    assert close(layer(x, activation), plain(x, activation))
    assert close(layer(x, activation, residual), plain(x, activation, residual))
    assert close(layer(x, activation, residual, 0.7), plain(x, activation) * 0.7 + residual)
    merged = layer.merged()
    assert type(merged) is Linear and np.array_equal(merged(x), plain(x))


def test_half_precision():
    """As in PEFT, adapters stay in float32 over a layer in bfloat16, whose dtype the result has."""
    layer = Linear(64, 32)
    layer.set_dtype(mx.bfloat16)
    for kind in KINDS.values():
        adapted = LoRALinear(layer, LoraConfig(**kind))
        adapted.lora_B.weight = mx.random.normal((32, 8))
        x = mx.random.normal((2, 64)).astype(mx.bfloat16)
        residual = mx.ones((2, 32), mx.bfloat16)
        assert {array.dtype for array in adapted.adapter().values()} == {mx.float32}
        assert adapted(x, residual=residual).dtype == mx.bfloat16 == adapted.merged().weight.dtype
        assert close(adapted(x).astype(mx.float32), adapted.merged()(x).astype(mx.float32), 2**-6)


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_beginning(tmp_path, kind):
    """New adapters change nothing; A is drawn as PEFT draws it."""
    model = base_model(tmp_path / "base", "ESM-2", "lm")
    ours = our_base(tmp_path / "base", "lm")
    before = logits(ours)
    add_adapters(ours, LoraConfig(r=64, target_modules=TARGETS, **KINDS[kind]))
    assert np.array_equal(logits(ours), before)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=64, target_modules=TARGETS, **KINDS[kind]))
    found = {our_name(n): p.detach().numpy() for n, p in theirs.base_model.model.named_parameters() if p.requires_grad}
    assert found.keys() == dict(tree_flatten(ours.trainable_parameters())).keys()
    for name, array in tree_flatten(ours.trainable_parameters()):
        if "lora_A" in name:
            bound = array.shape[1] ** -0.5
            assert 0.95 * bound < np.abs(array).max() <= bound >= np.abs(found[name]).max()
            assert abs(np.array(array).std() - found[name].std()) < 0.1 * bound
        else:
            assert np.allclose(array, found[name])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained(tmp_path, kind):
    """Adapters and the head; as many numbers as PEFT trains; and the mode of the model is that of its adapters."""
    theirs = base_model(tmp_path / "base", "ESM-2", "token")
    settings = {"r": 5, "target_modules": TARGETS, "task_type": "TOKEN_CLS", **KINDS[kind]}
    ours = add_adapters(our_base(tmp_path / "base", "token"), LoraConfig(**settings))
    trainable = dict(tree_flatten(ours.trainable_parameters()))
    assert {name.rpartition(".")[0] for name in trainable if "lora_" not in name} == {"classifier"}
    count, _ = peft.get_peft_model(theirs, peft.LoraConfig(**settings)).get_nb_trainable_parameters()
    assert ours.num_parameters(only_trainable=True) == count
    assert not any(module.training for _, module in ours.named_modules())
    merge_adapters(ours.train())
    assert all(module.training for _, module in ours.named_modules())
    assert {name for name, _ in tree_flatten(ours.trainable_parameters())} == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps(kind):
    """A compiled step is the step, and no step touches the base."""
    x, y = mx.random.normal((3, 7, 24)), mx.random.normal((3, 7, 16))
    states = []
    for compiled in (False, True):
        mx.random.seed(0)
        layer = LoRALinear(Linear(24, 16), LoraConfig(**KINDS[kind]))
        layer.base_layer.freeze()
        before = {name: np.array(array) for name, array in tree_flatten(layer.parameters())}
        optimizer = optim.SGD(0.1)
        state = [layer.state, optimizer.state]

        def step(layer=layer, optimizer=optimizer):
            loss, gradients = nn.value_and_grad(layer, lambda: nn.losses.mse_loss(layer(x), y))()
            optimizer.update(layer, gradients)
            return loss

        run = mx.compile(step, inputs=state, outputs=state) if compiled else step
        losses = [run().item() for _ in range(3)]
        assert losses[0] > losses[1] > losses[2]
        after = {name: np.array(array) for name, array in tree_flatten(layer.parameters())}
        assert all(np.array_equal(after[name], before[name]) == name.startswith("base_layer") for name in after)
        states.append(after)
    assert all(close(states[1][name], array) for name, array in states[0].items())


# Merged and quantized


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "head"), MODELS)
def test_merged(backend, tmp_path, family, head, kind):
    """An ordinary model, whose answers are those of before, and which torch loads."""
    model = peers(tmp_path, family, head, **KINDS[kind])
    before = logits(model.mlx, head)
    merge_adapters(model.mlx)
    assert close(logits(model.mlx, head), before)
    kinds = {type(module) for name, module in model.mlx.named_modules() if name.endswith(tuple(TARGETS))}
    assert kinds == {Linear}
    model.mlx.save_pretrained(tmp_path / "merged")
    theirs = getattr(transformers, f"Esm{HEADS[head][0]}").from_pretrained(tmp_path / "merged").eval()
    inputs = for_torch(batch(head=head), theirs)
    with torch.no_grad():
        real = Ellipsis if head == "single_label" else batch(head=head)["attention_mask"].astype(bool)
        wanted = model.torch(**inputs).logits[real]
        assert close(theirs(**inputs).logits[real], wanted) and close(before[real], wanted)


def quantize(model: Any, bits: int = 8) -> Any:
    nn.quantize(model, 32, bits, class_predicate=lambda name, m: "encoder" in name and isinstance(m, Linear))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_base(tmp_path, kind):
    """Adapters over a quantized model train it, and what PEFT has trained on the whole one loads over it."""
    base_model(tmp_path / "base", "ESM-2", "single_label")
    model = quantize(our_base(tmp_path / "base", "single_label"))
    config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["classifier"], **KINDS[kind])
    add_adapters(model, config).train()
    held = dict(model.named_modules())
    assert all(type(module.base_layer) is QuantizedLinear for module in held.values() if isinstance(module, LoRALinear))
    inputs, optimizer = batch(head="single_label"), optim.Adam(2e-3)
    losses = []
    for _ in range(25):
        loss, gradients = nn.value_and_grad(model, lambda: model(**inputs).loss)()
        assert all("lora_" in name or "classifier" in name for name, _ in tree_flatten(gradients))
        optimizer.update(model, gradients)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(quantize(our_base(tmp_path / "base", "single_label")), tmp_path / "adapter")
    trained = logits(model.eval(), "single_label")
    assert np.array_equal(logits(again, "single_label"), trained)
    merge_adapters(again)
    layer = again.esm.encoder.layer[0].attention.self
    assert type(layer.query) is Linear and type(layer.key) is QuantizedLinear
    assert close(logits(again, "single_label"), trained)


def test_a_quantized_head_cannot_be_trained(tmp_path):
    base_model(tmp_path / "base", "ESM-2", "single_label")
    model = our_base(tmp_path / "base", "single_label")
    nn.quantize(model.classifier, 32, 8, class_predicate=lambda name, m: name == "dense")
    with pytest.raises(ValueError, match="classifier.dense is quantized and cannot be trained"):
        add_adapters(model, LoraConfig(task_type="SEQ_CLS"))


# PEFT's files


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "head"), MODELS)
def test_files(tmp_path, family, head, kind):
    """Written by PEFT, read here, written here, read by PEFT: keys, numbers, settings and answers are the same."""
    model = peers(tmp_path, family, head, lora_dropout=0.1, **KINDS[kind])
    save_adapter(model.mlx, tmp_path / "ours")
    theirs, ours = arrays_of(tmp_path / "adapter"), arrays_of(tmp_path / "ours")
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert any("classifier" in name for name in ours) == (head != "lm")

    settings = [peft.LoraConfig.from_pretrained(tmp_path / name).to_dict() for name in ("adapter", "ours")]
    for setting in settings:
        del setting["base_model_name_or_path"], setting["auto_mapping"], setting["peft_version"]
        setting["target_modules"] = sorted(setting["target_modules"])
    assert settings[0] == settings[1]
    assert config_of(tmp_path / "ours")["base_model_name_or_path"] == str(tmp_path / "base")

    base = getattr(transformers, f"Esm{HEADS[head][0]}").from_pretrained(tmp_path / "base").eval()
    base.set_attn_implementation("eager")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    inputs = for_torch(batch(head=head), base)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.torch(**inputs).logits)


def test_torch_bin(tmp_path):
    model = peers(tmp_path, "ESM-2", "lm")
    state = {name: torch.tensor(array) for name, array in arrays_of(tmp_path / "adapter").items()}
    torch.save(state, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    again = load_adapter(our_base(tmp_path / "base", "lm"), tmp_path / "adapter")
    assert np.array_equal(logits(again), logits(model.mlx))


def test_a_head_that_comes_with_the_adapter(tmp_path):
    """A base model without the head takes it from the adapter, and does not count it as random any more."""
    model = peers(tmp_path, "ESM-2", "token")
    base_model(tmp_path / "lm", "ESM-2", "lm")
    ours, info = mlx_esm_hf.MLXEsmForTokenClassification.from_pretrained(
        tmp_path / "base", output_loading_info=True, num_labels=3
    )
    body = {name: array for name, array in ours.state_dict().items() if not name.startswith("classifier")}
    ours = mlx_esm_hf.MLXEsmForTokenClassification.from_pretrained(tmp_path / "base", state_dict=body)
    assert ours.newly_initialized == {"classifier.weight", "classifier.bias"}
    load_adapter(ours, tmp_path / "adapter")
    assert not ours.newly_initialized and np.array_equal(logits(ours, "token"), logits(model.mlx, "token"))


def test_a_head_that_was_tied(tmp_path):
    """PEFT trains the projection to the vocabulary by itself, which a model with one table for both cannot hold."""
    model = peft.get_peft_model(
        base_model(tmp_path / "base", "ESM-2", "lm"),
        peft.LoraConfig(target_modules=TARGETS, modules_to_save=["lm_head"]),
    ).eval()
    train_by_chance(model)
    model.save_pretrained(tmp_path / "adapter")
    assert_refused(
        tmp_path / "adapter", "holds 'lm_head.decoder.weight', a copy of the embedding .*tie_word_embeddings"
    )
    ours = mlx_esm_hf.MLXEsmForMaskedLM.from_pretrained(tmp_path / "base", tie_word_embeddings=False)
    load_adapter(ours, tmp_path / "adapter")
    inputs = batch("none", head="lm")
    with torch.no_grad():
        assert close(ours(**inputs).logits, model(**for_torch(inputs, model)).logits)


def test_another_family(tmp_path):
    """Files have the names of the model's first dialect, and targets are named by them."""
    mx.random.seed(0)
    model = ToyModel(ToyConfig())
    add_adapters(model, LoraConfig(target_modules=["h.0"], r=2))
    assert type(model.blocks[0]) is LoRALinear and type(model.blocks[1]) is Linear
    model.blocks[0].lora_B.weight = mx.random.normal((8, 2))
    save_adapter(model, tmp_path)
    assert arrays_of(tmp_path).keys() == {f"base_model.model.h.0.lora_{part}.weight" for part in "AB"}
    again = ToyModel(ToyConfig())
    again.update(merge_adapters(copy.deepcopy(model)).parameters())
    ids = mx.array([[5, 6, 7, 8]])
    assert close(again(ids).last_hidden_state, model(ids).last_hidden_state)
    mx.random.seed(0)
    loaded = load_adapter(ToyModel(ToyConfig()), tmp_path)
    assert np.array_equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)


def test_nothing_is_half_written(tmp_path, monkeypatch):
    model = our_base_with(tmp_path, LoraConfig())
    save_adapter(model, tmp_path / "adapter")
    before = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    model.esm.encoder.layer[0].attention.self.query.lora_B.weight *= 2

    def fail(*args: Any, **kwargs: Any) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(adapters.json, "dumps", fail)  # behind the weights
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, tmp_path / "adapter")
    assert {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()} == before


def test_a_model_with_adapters_is_no_checkpoint(tmp_path):
    model = our_base_with(tmp_path, LoraConfig())
    with pytest.raises(ValueError, match=r"self.value has an adapter, .*save_adapter.*merge_adapters"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# What is refused


@pytest.fixture
def saved(tmp_path):
    """The folder of an adapter for `our_base(tmp_path / "base", "lm")`."""
    save_adapter(our_base_with(tmp_path, LoraConfig(r=4)), tmp_path / "adapter")
    return tmp_path / "adapter"


def set_in_config(folder: Any, **settings: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | settings))


def assert_refused(folder: Any, message: str) -> None:
    """The adapter is not loaded, and the model is as it was."""
    model = our_base(folder.parent / "base", "lm")
    before, trainable = logits(model), dict(tree_flatten(model.trainable_parameters())).keys()
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, folder)
    assert np.array_equal(logits(model), before)
    assert dict(tree_flatten(model.trainable_parameters())).keys() == trainable
    assert not any(isinstance(module, LoRALinear) for _, module in model.named_modules())


def test_every_field_of_peft_is_known():
    """Supported, refused or ignored, and none of it twice; a new version of PEFT may bring others."""
    supported = {field.name for field in dataclasses.fields(LoraConfig)}
    assert supported | REFUSED | IGNORED_FIELDS == {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert len(supported) + len(REFUSED) + len(IGNORED_FIELDS) == len(supported | REFUSED | IGNORED_FIELDS)
    defaults = peft.LoraConfig()
    assert not any(getattr(defaults, name) for name in REFUSED), "off means false, empty or null"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_changes_the_numbers(saved, name):
    set_in_config(saved, **{name: [1]})
    assert_refused(saved, rf"adapter_config.json sets {name}=\[1\], which is not supported")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "is of 'IA3', where adapters here are of peft_type 'LORA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "drawn by 'pissa_niter_4', which changes the base model"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"r": 0}, "r=0 is no rank"),
        ({"r": 10**12}, "r=1000000000000 is no rank"),
        ({"r": "8"}, "r='8' is no rank"),
        ({"rank_pattern": {"query": True}}, "r=True is no rank"),
        ({"rank_pattern": [3]}, r"rank_pattern=\[3\] is not a dictionary"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan is not a number"),
        ({"lora_dropout": 1}, "lora_dropout=1 is no share"),
        ({"target_modules": [3]}, r"target_modules=\[3\] are not names"),
        ({"target_modules": "(query"}, r"'\(query' is not a regular expression"),
        ({"modules_to_save": "classifier"}, "modules_to_save='classifier' are not names"),
        (
            {"target_modules": ["q_proj"]},
            r"name no linear layer of MLXEsmForMaskedLM. It has.*layer.N.attention.self.key",
        ),
        ({"target_modules": ["word_embeddings"]}, "word_embeddings, of class Embedding: adapters go on linear layers"),
        (
            {"modules_to_save": ["score"]},
            r"modules_to_save=\['score'\]: the model has no such module, but esm, lm_head",
        ),
        ({"target_modules": ["query"]}, r"holds 'esm.*value.lora_A.weight', which is neither"),
        ({"use_dora": True}, r"lacks 6 of the adapter's arrays, 'esm.*query.lora_magnitude_vector' among them"),
        ({"r": 5}, r"query.lora_A.weight' is mlx.core.float32 of shape \(4, 32\), where .* shape \(5, 32\)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configs_that_are_refused(saved, settings, message):
    set_in_config(saved, **settings)
    assert_refused(saved, message)


def test_weights_that_are_refused(saved):
    arrays = arrays_of(saved)
    first = min(arrays)
    save_file({**arrays, first: arrays[first].astype(np.int32)}, saved / "adapter_model.safetensors")
    assert_refused(saved, "is mlx.core.int32 of shape")
    save_file({name: array for name, array in arrays.items() if name != first}, saved / "adapter_model.safetensors")
    assert_refused(saved, "lacks 1 of the adapter's arrays")
    (saved / "adapter_model.safetensors").write_bytes(b"cut off")
    assert_refused(saved, "not a whole safetensors file")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000])
def test_damaged_config(saved, text):
    (saved / "adapter_config.json").write_text(text)
    assert_refused(saved, "is not JSON|is of no config")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_is_missing(saved, name):
    (saved / name).unlink()
    with pytest.raises(OSError, match=f"holds (no|neither) {name}"):
        load_adapter(our_base(saved.parent / "base", "lm"), saved)


def test_from_the_hub(saved, tmp_path, monkeypatch):
    """A revision of a repository, then the same from the cache; what the Hub says where there is no adapter."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    local = load_adapter(our_base(tmp_path / "base", "lm"), saved)
    with hub.serve(hub.Hub({("me/adapter", "v1"): saved, ("me/adapter", "main"): tmp_path / "base"})) as endpoint:
        hub.use(monkeypatch, endpoint)
        model = load_adapter(our_base(tmp_path / "base", "lm"), "me/adapter", revision="v1")
        assert np.array_equal(logits(model), logits(local))
        with pytest.raises(OSError, match="me/adapter holds no adapter_config.json"):
            load_adapter(our_base(tmp_path / "base", "lm"), "me/adapter")
        with pytest.raises(OSError, match="has no repository me/other"):
            load_adapter(our_base(tmp_path / "base", "lm"), "me/other")
    again = load_adapter(our_base(tmp_path / "base", "lm"), "me/adapter", revision="v1", local_files_only=True)
    assert np.array_equal(logits(again), logits(local))


def test_fields_that_nobody_knows(saved, caplog):
    set_in_config(saved, my_note="hemolysis", peft_version="9.9")
    with caplog.at_level(logging.WARNING):
        load_adapter(our_base(saved.parent / "base", "lm"), saved)
    assert [r.getMessage() for r in caplog.records] == [
        f"{saved / 'adapter_config.json'} sets my_note, which nothing here knows: ignored."
    ]


def test_once(saved):
    """Adapters are added once, and there have to be some to be saved or merged."""
    model = our_base(saved.parent / "base", "lm")
    for use in (merge_adapters, lambda model: save_adapter(model, saved)):
        with pytest.raises(ValueError, match="MLXEsmForMaskedLM has no adapters"):
            use(model)
    load_adapter(model, saved)
    for again in (lambda: load_adapter(model, saved), lambda: add_adapters(model, LoraConfig())):
        with pytest.raises(ValueError, match="MLXEsmForMaskedLM has adapters: merge them"):
            again()
