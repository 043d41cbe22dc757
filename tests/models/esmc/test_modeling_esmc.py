"""ESMC models compared with transformers, their properties, and their interface."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten
from safetensors.torch import load_file

import mlx_esm_hf
from mlx_esm_hf import MLXEsmcForMaskedLM, MLXEsmcModel
from mlx_esm_hf.ops import cpu, dispatch, gpu
from tests.marks import needs_cpu
from tests.models.esmc.peers import answers, chain_batch, config, hold_answers, peers, torch_model
from tests.parity import HEADS, LENGTHS, Peers, as_numpy, batch, for_torch, hold, in_precision, one_thread, true_float64

HEADS_OF_CLASSES = ("model", "lm", "token", "single_label")
WITH_LOSS = [head for head in HEADS if head != "model"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    mx.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def get_peers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Peers]:
    """Cached `peers`. A test that changes a model must call `peers` itself."""

    @functools.cache
    def get(head: str = "lm", precision: str = "float32") -> Peers:
        model = peers(tmp_path_factory.mktemp(head), head)
        return model if precision == "float32" else in_precision(model, precision)

    return get


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make `ops` use one backend, "gpu" or "cpu", for everything; on a GPU keep its own choice."""
    backends: dict[str, ModuleType] = {"gpu": gpu, "cpu": cpu}

    def take(name: str) -> None:
        if mx.default_device() == mx.cpu:
            monkeypatch.setattr(dispatch, "backend_of", lambda *arrays: backends[name])

    return take


def make_batch(kind: str, head: str = "model", seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    return chain_batch(head, seed, lengths) if kind == "chains" else batch(kind, seed=seed, head=head, lengths=lengths)


# Against transformers


def hold_peers(model: Peers, inputs: dict[str, Any], backend: str = "", **how: str) -> None:
    title = type(model.mlx).__name__ + backend
    with true_float64():
        float64 = answers(model.float64, inputs)
    hold_answers(model, title, inputs, answers(model.torch, inputs), float64, **how)


@pytest.mark.parametrize("kind", ["none", "right", "chains"])
@pytest.mark.parametrize("head", HEADS_OF_CLASSES)
def test_outputs(get_peers: Callable[..., Peers], head: str, kind: str) -> None:
    lengths = LENGTHS * (2 if HEADS[head][0] == "ForSequenceClassification" else 1)  # few elements per row: more rows
    hold_peers(get_peers(head), make_batch(kind, head, lengths=lengths))


@pytest.mark.parametrize("tokens", [1, 2, 3, 33, 200, 1500])
@pytest.mark.parametrize("chains", [1, 3])
def test_lengths(get_peers: Callable[..., Peers], tokens: int, chains: int) -> None:
    inputs = {"input_ids": np.random.default_rng(tokens).integers(4, 24, (2, tokens))}
    if chains > 1:
        inputs["sequence_id"] = np.broadcast_to(np.arange(tokens) * chains // tokens, (2, tokens)).copy()
    hold_peers(get_peers(), inputs)


@pytest.mark.parametrize("rows", [1, 8])
def test_position_ids(get_peers: Callable[..., Peers], rows: int) -> None:
    inputs = batch("right")
    inputs["position_ids"] = np.random.default_rng(0).integers(0, 40, (rows, inputs["input_ids"].shape[1]))
    hold_peers(get_peers("model"), inputs)


@pytest.mark.parametrize("kind", ["right", "chains"])
@pytest.mark.parametrize("head", HEADS_OF_CLASSES)
@pytest.mark.parametrize("backend, precision", [("gpu", "float32"), ("gpu", "float16"), ("gpu", "bfloat16"),
                                                ("cpu", "float16"), ("cpu", "bfloat16")])  # fmt: skip
def test_backends(
    take: Callable, get_peers: Callable[..., Peers], backend: str, precision: str, head: str, kind: str
) -> None:
    """The GPU backend and half precision, compared with torch in the same precision."""
    model = get_peers(head, precision)
    take(backend)
    hold_peers(model, make_batch(kind, head), f", {backend}", precision=precision)


def losses(model: Any, batches: list[dict[str, Any]]) -> list[float]:
    with torch.no_grad():
        if isinstance(model, torch.nn.Module):
            return [float(model(**for_torch(inputs, model)).loss) for inputs in batches]
        return [model(**inputs).loss.item() for inputs in batches]


@pytest.mark.parametrize("kind", ["right", "chains"])
@pytest.mark.parametrize("head", WITH_LOSS)
def test_loss(get_peers: Callable[..., Peers], head: str, kind: str) -> None:
    """Compare several losses as one output: the error of a single number depends on luck."""
    model, batches = get_peers(head), [make_batch(kind, head, seed) for seed in range(8)]
    with true_float64():
        float64 = losses(model.float64, batches)
    hold(type(model.mlx).__name__, "loss", kind, losses(model.mlx, batches), losses(model.torch, batches), float64)


@pytest.mark.parametrize("kind", ["right", "chains"])
@pytest.mark.parametrize("head", ["lm", "token"])
def test_labels_at_padding_count(get_peers: Callable[..., Peers], head: str, kind: str) -> None:
    """As in transformers, labels at padding take part in the loss: many scripts pass `labels=input_ids`."""
    model, inputs = get_peers(head), make_batch(kind, head)
    inputs["labels"] = inputs["input_ids"] % model.torch.config.num_labels if head == "token" else inputs["input_ids"]
    expected = model.torch(**for_torch(inputs, model.torch)).loss.item()
    assert np.isclose(model.mlx(**inputs).loss.item(), expected, rtol=1e-5)


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return {parameter: gradient of the loss}."""
    model.train()
    if isinstance(model, torch.nn.Module):
        model.zero_grad()
        model(**for_torch(inputs, model)).loss.backward()
        found = {name: p.grad for name, p in model.named_parameters()}
    else:
        found = dict(tree_flatten(nn.value_and_grad(model, lambda: model(**inputs).loss)()[1]))
    model.eval()
    return {name: as_numpy(gradient) for name, gradient in found.items()}


def hold_gradients(model: Peers, batches: list[dict[str, Any]], title: str) -> None:
    """Compare several batches as one, as with losses: some parameters are a single number."""

    def stacked(peer: Any) -> dict[str, np.ndarray]:
        of_batches = [gradients(peer, inputs) for inputs in batches]
        return {name: np.stack([of_batch[name] for of_batch in of_batches]) for name in of_batches[0]}

    ours, theirs = stacked(model.mlx), stacked(model.torch)
    with true_float64():
        float64 = stacked(model.float64)
    assert ours.keys() == theirs.keys()
    for name in ours:
        hold(title, "gradients", name, ours[name], theirs[name], float64[name])


@pytest.mark.parametrize("kind", ["right", "chains"])
@pytest.mark.parametrize("head", WITH_LOSS)
def test_gradients(get_peers: Callable[..., Peers], head: str, kind: str) -> None:
    model = get_peers(head)
    hold_gradients(model, [make_batch(kind, head, seed) for seed in range(4)], type(model.mlx).__name__)


@pytest.mark.parametrize("kind", ["right", "chains"])
def test_gradients_on_a_gpu(take: Callable, get_peers: Callable[..., Peers], kind: str) -> None:
    take("gpu")
    hold_gradients(get_peers(), [make_batch(kind, "lm", seed) for seed in range(4)], "MLXEsmcForMaskedLM, gpu")


@pytest.mark.parametrize("kind", ["right", "chains"])
def test_gradient_checkpointing(get_peers: Callable[..., Peers], kind: str) -> None:
    model, inputs = copy.deepcopy(get_peers().mlx), make_batch(kind, "lm")
    before = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    assert model.esmc.gradient_checkpointing
    for name, gradient in gradients(model, inputs).items():
        assert np.allclose(gradient, before[name], rtol=1e-5, atol=1e-6 * np.abs(gradient).max()), name


@pytest.mark.parametrize("biases", ["attention_bias", "mlp_bias"])
def test_biases(tmp_path: Path, biases: str) -> None:
    """Biases are optional in the config; no published ESMC has them."""
    model = peers(tmp_path, "lm", **{biases: True})
    hold_peers(model, batch("right"))


def test_tuples(get_peers: Callable[..., Peers]) -> None:
    """return_dict=False returns transformers' tuple, in the same order."""
    for head in HEADS_OF_CLASSES:
        model, inputs = get_peers(head), batch("right", head=head)
        asked = {"output_hidden_states": True, "output_attentions": True, "return_dict": False}
        with torch.no_grad():
            theirs = model.torch(**for_torch(inputs, model.torch), **asked)
        ours = model.mlx(**inputs, **asked)
        shapes = [[tuple(x.shape) for x in (part if isinstance(part, tuple) else [part])] for part in ours]
        assert shapes == [[tuple(x.shape) for x in (part if isinstance(part, tuple) else [part])] for part in theirs]


# Properties


def test_chains_are_independent(get_peers: Callable[..., Peers]) -> None:
    """The states of a chain do not depend on other chains, which only shift its positions."""
    model = get_peers("model").mlx
    first, second = np.arange(4, 14)[None], np.arange(9, 24)[None]
    together = np.concatenate([first, second], axis=1)
    chains = np.array([[0] * 10 + [1] * 15])
    states = model(together, sequence_id=chains).last_hidden_state
    alone = model(second, position_ids=np.arange(10, 25)).last_hidden_state
    assert np.allclose(states[:, 10:], alone, atol=1e-5)
    assert np.allclose(states[:, :10], model(first).last_hidden_state, atol=1e-5)
    assert not np.allclose(states, model(together).last_hidden_state, atol=1e-3)


def test_sequence_id_of_one_chain_equals_the_mask(get_peers: Callable[..., Peers]) -> None:
    """`sequence_id` replaces `attention_mask`; with a single chain the results are equal."""
    model, inputs = get_peers("single_label").mlx, batch("right")
    real = inputs["attention_mask"]
    expected = model(**inputs).logits
    for mask in (None, real, np.zeros_like(real)):
        assert mx.array_equal(model(inputs["input_ids"], mask, sequence_id=real - 1).logits, expected)


@pytest.mark.parametrize("kind", ["right", "chains"])
def test_packing_changes_nothing(take: Callable, get_peers: Callable[..., Peers], kind: str) -> None:
    model, inputs = get_peers().mlx, make_batch(kind)
    packed = answers(model, inputs, attentions=False)
    take("cpu")
    for name, layers in answers(model, inputs, attentions=False).items():
        for one, other in zip(layers, packed[name], strict=True):
            assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max(), name


@pytest.mark.parametrize("kind", ["right", "chains"])
def test_row_without_residues(get_peers: Callable[..., Peers], kind: str) -> None:
    """Its outputs are finite, and other rows do not change."""
    model, inputs = get_peers().mlx, make_batch(kind)
    before = np.array(model(**inputs).logits)
    empty = {name: 1 if name == "input_ids" else -1 if name == "sequence_id" else 0 for name in inputs}
    inputs = {name: np.concatenate([x, np.full_like(x[:1], empty[name])]) for name, x in inputs.items()}
    after = np.array(model(**inputs, output_attentions=True).logits)
    assert np.isfinite(after).all() and np.isfinite(model(**inputs).logits).all()
    real = (inputs.get("attention_mask", inputs.get("sequence_id", 0) + 1) > 0)[:-1]
    assert np.abs(after[:-1] - before)[real].max() < 1e-5 * np.abs(before).max()


def test_left_padding(get_peers: Callable[..., Peers]) -> None:
    """The classifier reads the first real token; positions count columns, as in transformers."""
    model, inputs = get_peers("single_label").mlx, batch("left")
    for row, length in enumerate(inputs["attention_mask"].sum(axis=1)):
        columns = slice(inputs["input_ids"].shape[1] - length, None)
        positions = np.arange(inputs["input_ids"].shape[1])[columns]
        alone = model(inputs["input_ids"][row : row + 1, columns], position_ids=positions).logits
        assert np.allclose(model(**inputs).logits[row], alone[0], atol=1e-4)


def test_dropout() -> None:
    for head, settings in (("lm", {"attention_dropout": 0.5}), ("token", {"classifier_dropout": 0.5})):
        model = build(head, **settings)
        inputs = batch()
        plain = model(**inputs).logits
        assert mx.array_equal(model(**inputs).logits, plain)
        model.train()
        first, second = model(**inputs).logits, model(**inputs).logits
        assert not np.allclose(first, second, atol=1e-3) and not np.allclose(first, plain, atol=1e-3)


@needs_cpu
@pytest.mark.parametrize("attentions", [False, True], ids=["", "attentions"])
@pytest.mark.parametrize("head", HEADS_OF_CLASSES)
def test_a_cpu_computes_in_float32(head: str, attentions: bool) -> None:
    """The result of a bfloat16 model is that of the same weights in float32, rounded once."""
    half = build(head).bfloat16()
    whole = copy.deepcopy(half).float()
    inputs = batch("right") | {"output_hidden_states": True, "output_attentions": attentions}
    outputs = [tree_flatten(model(**inputs).to_tuple()) for model in (half, whole)]
    for (name, ours), (_, wanted) in zip(*outputs, strict=True):
        assert ours.dtype == mx.bfloat16, name
        wanted = as_numpy(wanted)
        np.testing.assert_allclose(as_numpy(ours), wanted, 2**-8, 1e-5 * np.abs(wanted).max(), err_msg=name)


# Parameters


def build(head: str = "lm", **overrides: Any) -> Any:
    """Create a model with random weights, in evaluation mode."""
    return getattr(mlx_esm_hf, f"MLXEsmc{HEADS[head][0]}")(config(head, **overrides)).eval()


@pytest.mark.parametrize("head", HEADS_OF_CLASSES)
def test_initialization(head: str) -> None:
    """Each parameter has the name, shape and initialization of transformers'."""
    std = 0.05
    settings = {"hidden_size": 96, "intermediate_size": 200, "num_attention_heads": 4, "initializer_range": std}
    model, other = build(head, **settings), getattr(transformers, f"Esmc{HEADS[head][0]}")(config(head, **settings))
    expected = other.state_dict()
    assert {name: x.shape for name, x in model.state_dict().items()} == {
        name: tuple(x.shape) for name, x in expected.items()
    }
    assert [name for name, _ in model.named_parameters()] and model.num_parameters() == other.num_parameters()
    for name, value in model.state_dict().items():
        value, theirs = np.array(value), expected[name].numpy()
        if theirs.std() == 0:
            assert np.array_equal(value, theirs), name
        else:
            tolerance = 5 * std / np.sqrt(2 * value.size)
            assert abs(value.std() - std) < tolerance and abs(theirs.std() - std) < tolerance, name


@pytest.mark.parametrize("head", HEADS_OF_CLASSES)
def test_round_trip(tmp_path: Path, head: str) -> None:
    """A model from transformers and back has the same keys and bits, and transformers reports nothing."""
    model = torch_model(head)
    model.save_pretrained(tmp_path / "theirs")
    ours = getattr(mlx_esm_hf, f"MLXAutoModel{HEADS[head][0].removeprefix('Model')}").from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(ours[1].values())
    ours[0].save_pretrained(tmp_path / "ours")
    written, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()) and type(model).__name__ == again.config.architectures[0]
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())


def test_base_model_and_head(tmp_path: Path) -> None:
    """A base model loads into a model with a head, and the reverse."""
    model = build("lm")
    model.esmc.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "head")
    base, info = MLXEsmcModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not info["missing_keys"] and mx.array_equal(base.norm.weight, model.esmc.norm.weight)
    whole = MLXEsmcForMaskedLM.from_pretrained(tmp_path / "base")
    assert {name.partition(".")[0] for name in whole.newly_initialized} == {"lm_head"}
    with pytest.raises(ValueError, match="had no lm_head, so predicting residues would use random weights"):
        whole([[0, 5, 2]])


def test_resize_token_embeddings() -> None:
    model, ids = build("lm"), [[0, 5, 6, 7, 2]]
    before = model(ids).logits
    model.resize_token_embeddings(70)
    after = model(ids).logits
    assert after.shape == (1, 5, 70) and np.allclose(after[..., :64], before, atol=1e-5)
    assert model.lm_head.decoder.bias.shape == (70,) and model.config.vocab_size == 70


def test_containers(get_peers: Callable[..., Peers]) -> None:
    model, inputs = get_peers("token").mlx, chain_batch("token")
    expected = model(**inputs)
    for convert in (mx.array, np.ndarray.tolist, torch.from_numpy):
        output = model(**{name: convert(x) for name, x in inputs.items()})
        assert mx.array_equal(output.logits, expected.logits) and output.loss.item() == expected.loss.item()


# Errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_ids": [[0, 64, 2]]}, r"input_ids\[0, 1\] is 64, expected 0 to 63"),
        ({"input_ids": [0, 5, 2]}, "input_ids must have shape"),
        ({"input_ids": [[0, 5, 2]], "attention_mask": [[1, 1]]}, "attention_mask must have the shape of the input"),
        (
            {"input_ids": [[0, 5, 2]], "sequence_id": [[0, 0]]},
            r"sequence_id must have the shape of the input, \(1, 3\), got \(1, 2\)",
        ),
        ({"input_ids": [[0, 5, 2]], "sequence_id": [[0.0, 0.0, 1.0]]}, "sequence_id must be integers"),
    ],
)
def test_bad_inputs(get_peers: Callable[..., Peers], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peers().mlx(**arguments)
