"""Metal's and CUDA's way through the models, and half precision, held to torch in the same precision.

MLX's own fused operations, which `ops.gpu` calls, give right answers on a CPU as well, slowly. So where there is no GPU
these tests take its way on the CPU; where a GPU is the default device they run on it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from esm import ProteinBertModel
from mlx.utils import tree_flatten

from mlx_esm_hf import ops
from mlx_esm_hf.ops import cpu, dispatch, gpu, kernels
from tests.marks import needs_cpu, needs_kernels
from tests.models.esm.test_modeling_esm import CLASSES, WITH_LOSS, reads_first_token
from tests.parity import (
    FAMILIES,
    HEADS,
    LENGTHS,
    Answers,
    Peers,
    answers,
    as_numpy,
    batch,
    fair_esm_answers,
    fair_esm_peers,
    for_torch,
    from_fair_esm,
    hold,
    hold_all,
    in_precision,
    one_thread,
    peers,
    true_float64,
)

PRECISIONS = ("float32", "float16", "bfloat16")


def names_of_backends(precision: str) -> list[str]:
    """Those that a model takes in this precision and that no other test takes.

    In float32 `ops.cpu` is what all other tests take where our kernels are not there (MLX_ESM_KERNELS=0).
    """
    if mx.default_device() == mx.gpu or precision == "float32":
        return ["gpu"]
    return ["own choice", "gpu", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make `ops` take a backend for everything, "gpu" or "cpu". Its own choice, which comes first, are our kernels
    where they are there, in half precision, too."""
    backends: dict[str, ModuleType] = {"gpu": gpu, "cpu": cpu}

    def take(name: str) -> None:
        if mx.default_device() == mx.cpu and name != "own choice":
            monkeypatch.setattr(dispatch, "backend_of", lambda *arrays: backends[name])

    return take


@pytest.fixture(scope="module")
def get_peers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Peers]:
    """Peers by family, head and precision, each made once."""

    @functools.cache
    def in_float32(family: str, head: str) -> Peers:
        if family == "ESM-1":
            # fair-esm's token dropout makes float32 of half precision, which its layers then refuse.
            return fair_esm_peers(family, token_dropout=False)
        return peers(tmp_path_factory.mktemp(head), family, head)

    @functools.cache
    def get(family: str, head: str, precision: str) -> Peers:
        model = in_float32(family, head)
        return model if precision == "float32" else in_precision(model, precision)

    return get


def title(model: Peers, backend: str) -> str:
    return f"{type(model.mlx).__name__}, {backend}"


# Outputs


def torch_answers(peer: torch.nn.Module, head: str, inputs: dict[str, Any], right: dict[str, Any]) -> Answers:
    """What transformers reads at position 0 is that of the batch padded on the right."""
    result = answers(peer, inputs)
    if right is not inputs:
        other = answers(peer, right)
        result |= {name: other[name] for name in reads_first_token(head) & result.keys()}
    return result


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("head", CLASSES.values())
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_outputs(take: Callable, get_peers: Callable, precision: str, family: str, head: str, padding: str) -> None:
    model = get_peers(family, head, precision)
    lengths = LENGTHS * (2 if HEADS[head][0] == "ForSequenceClassification" else 1)  # few numbers a row: more rows
    inputs = batch(padding, lengths=lengths)
    right = batch("right", lengths=lengths) if padding == "left" else inputs
    theirs = torch_answers(model.torch, head, inputs, right)
    with true_float64():
        float64 = torch_answers(model.float64, head, inputs, right)
    for backend in names_of_backends(precision):
        take(backend)
        hold_all(model, family, inputs, theirs, (f", {backend}", float64), precision=precision)


@pytest.mark.parametrize("padding", ["none", "right"])  # fair-esm counts padding on the left among the positions
@pytest.mark.parametrize("precision", PRECISIONS)
def test_outputs_of_esm1(take: Callable, get_peers: Callable, precision: str, padding: str) -> None:
    model = get_peers("ESM-1", "lm", precision)
    inputs = batch(padding, masks=False)
    theirs = fair_esm_answers(model.torch, inputs["input_ids"])
    with true_float64():
        float64 = fair_esm_answers(model.float64, inputs["input_ids"])
    for backend in names_of_backends(precision):
        take(backend)
        hold_all(model, "ESM-1", inputs, theirs, (f", {backend}", float64), precision=precision)


@needs_cpu
@pytest.mark.parametrize("attentions", [False, True], ids=["", "attentions"])
@pytest.mark.parametrize("kernels_there", [True, False], ids=["own choice", "kernels off"])
@pytest.mark.parametrize("head", CLASSES.values())
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_cpu_computes_in_float32(
    get_peers: Callable,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    family: str,
    head: str,
    kernels_there: bool,
    attentions: bool,
) -> None:
    """What it returns is what the same weights in float32 give, rounded once."""
    if not kernels_there:
        monkeypatch.setattr(kernels, "native", None)
    half = get_peers(family, head, precision).mlx
    whole = copy.deepcopy(half).float()
    inputs = batch("right") | {"output_hidden_states": True, "output_attentions": attentions}
    digits = {"float16": 2**-11, "bfloat16": 2**-8}[precision]
    outputs = [tree_flatten(model(**inputs).to_tuple()) for model in (half, whole)]
    for (name, ours), (_, wanted) in zip(*outputs, strict=True):
        assert ours.dtype == half.dtype, name
        wanted = as_numpy(wanted)
        np.testing.assert_allclose(as_numpy(ours), wanted, digits, 1e-5 * np.abs(wanted).max(), err_msg=name)


@needs_kernels
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_batches_are_packed(dtype: mx.Dtype) -> None:
    mask = np.array([[1, 1, 0]])
    assert ops.choose_layout((1, 3), mx.array(mask), mask, dtype).packed


@pytest.mark.parametrize("given", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_inputs_embeds_of_another_dtype(get_peers: Callable, precision: str, given: str) -> None:
    """They become what the network computes in; it answers in its own dtype."""
    model = get_peers("ESM-2", "lm", precision).mlx
    inputs = batch("right")
    ids, mask = (mx.array(inputs[name]) for name in ("input_ids", "attention_mask"))
    embeds = model.esm.embeddings(ids, mask)
    wanted = model(inputs_embeds=embeds, attention_mask=mask).logits
    logits = model(inputs_embeds=embeds.astype(getattr(mx, given)), attention_mask=mask).logits
    assert logits.dtype == wanted.dtype == model.dtype
    assert mx.allclose(logits.astype(mx.float32), wanted.astype(mx.float32), atol=0.05 * mx.abs(wanted).max().item())


# Losses and gradients


def loss_of(model: Any, inputs: dict[str, Any]) -> Any:
    if isinstance(model, torch.nn.Module):
        inputs = for_torch(inputs, model)
    if isinstance(model, ProteinBertModel):  # has no loss of its own
        logits = model(inputs["input_ids"])["logits"]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
    return model(**inputs).loss


def losses(model: Any, batches: list[dict[str, Any]]) -> list[float]:
    with torch.no_grad():
        return [loss_of(model, inputs).item() for inputs in batches]


@pytest.mark.parametrize("head", WITH_LOSS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_loss(take: Callable, get_peers: Callable, precision: str, family: str, head: str) -> None:
    """Several as one output: a single number's error is a matter of luck."""
    model = get_peers(family, head, precision)
    batches = [batch(seed=seed, head=head) for seed in range(8)]
    theirs = losses(model.torch, batches)
    with true_float64():
        float64 = losses(model.float64, batches)
    for backend in names_of_backends(precision):
        take(backend)
        ours = losses(model.mlx, batches)
        hold(title(model, backend), "loss", family, ours, theirs, float64, precision=precision)


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """The gradients of the loss by the name of their parameter, but for the contact head, which has no part in it."""
    model.train()
    if isinstance(model, torch.nn.Module):
        model.zero_grad()
        loss_of(model, inputs).backward()
        result = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if isinstance(model, ProteinBertModel):
            result = from_fair_esm(result)
    else:
        tree = nn.value_and_grad(model, lambda: loss_of(model, inputs))()[1]
        result = {name: gradient for name, gradient in tree_flatten(tree) if "contact_head" not in name}
    model.eval()
    return {name: as_numpy(gradient) for name, gradient in result.items()}


def gradients_of(model: Any, batches: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    of_batches = [gradients(model, inputs) for inputs in batches]
    return {name: np.stack([of_batch[name] for of_batch in of_batches]) for name in of_batches[0]}


def as_one(gradients: dict[str, np.ndarray], scales: dict[str, float]) -> np.ndarray:
    return np.concatenate([gradients[name].ravel() / scale for name, scale in scales.items()])


@pytest.mark.parametrize(
    ("family", "head"), [(family, head) for family in FAMILIES for head in WITH_LOSS] + [("ESM-1", "lm")]
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients(take: Callable, get_peers: Callable, precision: str, family: str, head: str) -> None:
    """In float32 each parameter is held to the bar, in half precision all of them as one, each over its scale.

    Some are few numbers, such as the bias of a regression: how they are rounded is a matter of luck.
    """
    model = get_peers(family, head, precision)
    # At padding ESM-1v's layer norm divides by the root of 1e-12, of which torch's float16 backward makes NaN.
    padding = "none" if (family, precision) == ("ESM-1v", "float16") else "right"
    batches = [batch(padding, seed=seed, head=head) for seed in range(4)]
    theirs = gradients_of(model.torch, batches)
    with true_float64():
        float64 = gradients_of(model.float64, batches)
    # The gradient of a key's bias is a difference of numbers of the size that its weight's has.
    scales = {name: np.abs(float64[name.replace("key.bias", "key.weight")]).max() for name in float64}
    for backend in names_of_backends(precision):
        take(backend)
        ours = gradients_of(model.mlx, batches)
        assert ours.keys() == theirs.keys()
        if precision == "float32":
            for name, scale in scales.items():
                compared = ours[name], theirs[name], float64[name]
                hold(title(model, backend), "gradients", f"{family} {name}", *compared, scale)
        else:
            compared = as_one(ours, scales), as_one(theirs, scales), as_one(float64, scales)
            hold(title(model, backend), "gradients", family, *compared, precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_at_padding_are_finite(take: Callable, get_peers: Callable, precision: str) -> None:
    """Of ESM-1v, where torch's are NaN in float16."""
    model = get_peers("ESM-1v", "lm", precision)
    for backend in names_of_backends(precision):
        take(backend)
        of_parameters = gradients(model.mlx, batch("right", head="lm"))
        assert all(np.isfinite(gradient).all() for gradient in of_parameters.values())
