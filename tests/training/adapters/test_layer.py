"""`LoRALinear`, with PEFT's layer as the reference."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import peft
import pytest
import torch
from mlx.utils import tree_flatten

from mlx_esm_hf.modeling_layers import Linear
from mlx_esm_hf.training.adapters import LoraConfig, LoRALinear
from tests.parity import batch
from tests.training.adapters.helpers import KINDS, close, our_base_with, our_name, randomize_adapters


def fixed_dropout(p: float = 0.5) -> tuple[np.ndarray, float]:
    """Return a dropout mask, [3, 7, 24], and the factor of the elements that are kept."""
    return np.random.default_rng(0).random((3, 7, 24)) > p, 1 / (1 - p)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_dropout(backend, kind, bias):
    """With the same elements dropped, outputs and gradients equal PEFT's: dropout applies to the adapter only."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 16, bias=bias)
    ours = Linear(24, 16, bias=bias)
    ours.update({name: mx.array(p.detach().numpy()) for name, p in linear.named_parameters()})
    settings = {"r": 4, "lora_dropout": 0.5, **KINDS[kind]}
    model = peft.get_peft_model(torch.nn.Sequential(linear), peft.LoraConfig(target_modules=["0"], **settings))
    randomize_adapters(model)
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
    expected = np.array(model(inputs).logits)
    assert np.array_equal(expected, model(inputs).logits)
    model.train()
    assert not np.array_equal(model(inputs).logits, model(inputs).logits)
    model.eval()
    assert np.array_equal(expected, model(inputs).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer(backend, bias, quantized, activation, kind):
    """It accepts the arguments of `Linear` and computes the same as a `Linear` with its `weight` and `bias`."""
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
    """As in PEFT, the adapter of a bfloat16 layer is in float32, and the output has the dtype of the layer."""
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
def test_compiled_steps(kind):
    """A compiled training step gives the same weights as a plain one, and neither changes the base layer."""
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
