"""The optimizers compared with those of torch and transformers, on the same gradients."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten, tree_unflatten

from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.optimizer import AdamW, create_optimizer, prepare_optimizer
from mlx_esm_hf.training.trainer import MLXTrainer
from tests.training.trainings import InOrder, losses_of, masked_rows, padded, twins

SHAPES = {"body.weight": (6, 5), "body.bias": (6,), "norm.weight": (6,), "head.weight": (3, 6), "head.bias": (3,)}
NAMES = list(SHAPES)


class Network(nn.Module):
    """A model with a matrix, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(5, 6), nn.RMSNorm(6), nn.Linear(6, 3)


def weights(rng):
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def steps_of(make_ours, make_theirs, schedule=lambda step: 1.0, max_norm=2.0):
    """Take twenty steps in MLX and in torch, and return the largest relative difference of their changes."""
    rng = np.random.default_rng(0)
    start = weights(rng)
    model = Network()
    model.update(tree_unflatten([(name, mx.array(x)) for name, x in start.items()]))
    named = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
    ours, theirs = make_ours(model.trainable_parameters()), make_theirs(named)
    rates = [group["lr"] for group in theirs.param_groups]
    for step in range(20):
        gradients = weights(rng)
        ours.learning_rate = ours.initial_learning_rate * schedule(step)
        norm = ours.update(model, tree_unflatten([(name, mx.array(x)) for name, x in gradients.items()]))
        for name, x in gradients.items():
            named[name].grad = torch.tensor(x)
        expected = torch.nn.utils.clip_grad_norm_(named.values(), max_norm) if max_norm else norm.item()
        assert norm.item() == pytest.approx(float(expected), rel=1e-6)
        for group, rate in zip(theirs.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step)
        theirs.step()
    changes = {}
    for name, x in tree_flatten(model.trainable_parameters()):
        change = named[name].detach().numpy() - start[name]
        changes[name] = np.abs(np.array(x) - start[name] - change).max() / max(np.abs(change).max(), 1)
    return max(changes.values())


def groups_of(named, **options):
    """Return the groups of transformers' Trainer."""
    decayed = [name for name in named if name in ("body.weight", "head.weight")]
    return [
        {"params": [named[name] for name in decayed], "weight_decay": 0.1, **options},
        {"params": [x for name, x in named.items() if name not in decayed], "weight_decay": 0.0, **options},
    ]


class Lion(torch.optim.Optimizer):
    """Lion by the formula of its paper, since torch has none."""

    def __init__(self, groups, lr, betas):
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            first, second = group["betas"]
            for weight in group["params"]:
                moment = self.state[weight].setdefault("moment", torch.zeros_like(weight))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(group["lr"] * torch.sign(first * moment + (1 - first) * weight.grad))
                moment.mul_(second).add_(weight.grad, alpha=1 - second)


ADAFACTOR = {"scale_parameter": False, "relative_step": False}


@pytest.mark.parametrize(
    ("arguments", "theirs"),
    [
        ({"optim": "adamw_torch"}, lambda groups: torch.optim.AdamW(groups, lr=0.01)),
        ({"optim": "sgd"}, lambda groups: torch.optim.SGD(groups, lr=0.01)),
        (
            {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=True"},
            lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
        ),
        ({"optim": "adagrad"}, lambda groups: torch.optim.Adagrad(groups, lr=0.01)),
        ({"optim": "rmsprop", "optim_args": "alpha=0.9"}, lambda groups: torch.optim.RMSprop(groups, 0.01, 0.9)),
        ({"optim": "adafactor"}, lambda groups: transformers.Adafactor(groups, lr=0.01, **ADAFACTOR)),
        ({"optim": "lion_32bit"}, lambda groups: Lion(groups, lr=0.01, betas=(0.9, 0.999))),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_optimizers_equal_torch(arguments, theirs):
    args = MLXTrainingArguments("out", learning_rate=0.01, weight_decay=0.1, max_grad_norm=2.0, **arguments)
    difference = steps_of(
        lambda parameters: create_optimizer(args, parameters),
        lambda named: theirs(groups_of(named)),
        lambda step: 1 - step / 20,
    )
    assert difference < 1e-6


def test_parameter_groups_equal_torch():
    """A head with its own learning rate, a group without decay, and a frozen norm."""
    ours = [
        {"params": ["head.weight", "head.bias"], "lr": 0.03, "weight_decay": 0.2},
        {"params": ["body.weight"]},
        {"params": ["body.bias"], "weight_decay": 0.0},
    ]
    difference = steps_of(
        lambda parameters: AdamW(parameters, 0.003, weight_decay=0.1, max_grad_norm=2.0, groups=ours),
        lambda named: torch.optim.AdamW(
            [group | {"params": [named[name] for name in group["params"]]} for group in ours],
            lr=0.003,
            weight_decay=0.1,
        ),
        lambda step: 1 / (1 + step),
    )
    assert difference < 1e-6


def test_an_optimizer_of_the_user_with_two_learning_rates_equals_torch():
    def ours(parameters):
        parts = [optim.SGD(0.03, momentum=0.9), optim.SGD(0.01)]
        multiple = optim.MultiOptimizer(parts, [lambda name, _: name.startswith("head")])
        return prepare_optimizer(multiple, parameters, 2.0)

    def theirs(named):
        head = [x for name, x in named.items() if name.startswith("head")]
        rest = [x for name, x in named.items() if not name.startswith("head")]
        return torch.optim.SGD([{"params": head, "lr": 0.03, "momentum": 0.9}, {"params": rest}], lr=0.01)

    assert steps_of(ours, theirs, lambda step: 1 - step / 40) < 1e-6


def test_a_schedule_of_the_optimizer_is_kept():
    optimizer = prepare_optimizer(optim.SGD(optim.linear_schedule(1.0, 0.0, 10)), Network().trainable_parameters(), 0)
    model = Network()
    zeros = tree_unflatten([(name, mx.zeros(shape)) for name, shape in SHAPES.items()])
    rates = []
    for _ in range(3):
        optimizer.learning_rate = 5.0
        optimizer.update(model, zeros)
        rates.append(optimizer.learning_rate)
    assert rates == pytest.approx([1.0, 0.9, 0.8])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"params": ["body.wieght"]}], "no trainable parameter 'body.wieght'. Did you mean body.weight"),
        ([{"params": NAMES}, {"params": ["head.bias"]}], "head.bias is in two parameter groups"),
        ([{"params": [mx.zeros(3)]}], "must be names of parameters"),
        ([{"params": NAMES, "betas": (0.9, 0.98)}], "params, lr and weight_decay, got betas"),
    ],
)
def test_wrong_groups_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        AdamW(Network().trainable_parameters(), groups=groups)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optim": "galore_adamw"}, "optim must be one of .* MLXTrainer"),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "Did you mean momentum"),
        ({"optim": "sgd", "optim_args": "momentum=high"}, "momentum must be a number, got 'high'"),
        ({"optim": "sgd", "optim_args": "nesterov=maybe"}, "nesterov must be true or false"),
        ({"optim": "rmsprop", "optim_args": "centered=true"}, "rmsprop has no option 'centered'"),
        ({"optim_args": "eps=1e-6"}, "adamw has no option"),
    ],
)
def test_wrong_optimizers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLXTrainingArguments("out", **arguments)


def test_an_optimizer_of_torch_is_refused():
    with pytest.raises(ValueError, match=r"mlx.optimizers or .*AdamW, got torch.optim.sgd.SGD"):
        prepare_optimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), {}, 1.0)


def test_eight_bit_moments_are_kept_in_32_bits():
    with pytest.warns(UserWarning, match="32 bits"):
        args = MLXTrainingArguments("out", optim="paged_adamw_8bit")
    assert isinstance(create_optimizer(args, Network().trainable_parameters()), AdamW)


def test_a_training_with_sgd_compared_with_torch(tmp_path):
    ours, theirs = twins("ForMaskedLM", tmp_path)
    rows = masked_rows(80)
    args = MLXTrainingArguments(
        tmp_path / "out", max_steps=10, learning_rate=0.05, optim="sgd", optim_args="momentum=0.9", logging_steps=1,
        lr_scheduler_type="cosine", save_strategy="steps", save_steps=5,
    )  # fmt: skip
    MLXTrainer(ours, args, padded, InOrder(rows)).train()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9)
    scheduler = transformers.get_scheduler("cosine", optimizer, 0, 10)
    expected = []
    for step in range(10):
        inputs = {name: torch.tensor(x) for name, x in padded(rows[8 * step : 8 * step + 8]).items()}
        loss = theirs(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses_of(tmp_path / "out") == pytest.approx(expected, rel=1e-5)

    ours, _ = twins("ForMaskedLM", tmp_path)
    resumed = MLXTrainer(ours, args, padded, InOrder(rows))
    resumed.train(resume_from_checkpoint=tmp_path / "out" / "checkpoint-5")
    assert losses_of(tmp_path / "out") == pytest.approx(expected, rel=1e-5)
