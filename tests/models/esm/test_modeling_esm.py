"""ESM models compared with transformers and fair-esm, their properties, and their interface.

`tests/parity.py` creates the peers and defines the tolerance.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import esm as fair_esm
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.optimizers import SGD
from mlx.utils import tree_flatten

import mlx_esm_hf
from mlx_esm_hf import Esm1Tokenizer, EsmTokenizer, MLXEsm1Config, MLXEsmForMaskedLM, MLXEsmModel
from tests.parity import (
    CLS,
    EOS,
    FAMILIES,
    HEADS,
    LENGTHS,
    MASK,
    PAD,
    RESIDUES,
    Answers,
    Peers,
    answers,
    batch,
    config,
    fair_esm_answers,
    fair_esm_peers,
    for_torch,
    from_fair_esm,
    hold,
    hold_all,
    one_thread,
    peers,
    true_float64,
    with_mask,
)
from tests.tiny import SIZE, as_loaded

ALL_FAMILIES = ("ESM-1", *FAMILIES)
CLASSES = {HEADS[head][0]: head for head in ("model", "lm", "token", "single_label")}
WITH_LOSS = [head for head in HEADS if head != "model"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    mx.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def get_peers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Peers]:
    """Cached `parity.peers`. A test that changes a model must call `parity.peers` itself."""

    @functools.cache
    def get(family: str, head: str = "lm", **overrides: Any) -> Peers:
        return peers(tmp_path_factory.mktemp(head), family, head, **overrides)

    return get


get_fair_esm_peers = functools.cache(fair_esm_peers)


@pytest.fixture
def get_model(get_peers: Callable[..., Peers]) -> Callable[[str], Any]:
    """Return a masked language model of any family."""
    return lambda family: (get_fair_esm_peers(family) if family == "ESM-1" else get_peers(family)).mlx


def close(a: Any, b: Any, tolerance: float = 1e-5) -> bool:
    """Return whether two arrays differ by at most this fraction of their scale."""
    a, b = np.array(a), np.array(b)
    return a.shape == b.shape and bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


# Against transformers


def reads_first_token(head: str) -> set[str]:
    """Return the outputs that transformers reads at position 0, which is correct only with padding on the right."""
    return {"pooler_output", "contacts"} | ({"logits"} if HEADS[head][0] == "ForSequenceClassification" else set())


def hold_peers(model: Peers, family: str, head: str, inputs: dict[str, Any], right: dict[str, Any]) -> None:
    """Compare all outputs with true float64 and transformers' float64; `right` is the batch padded on the right."""

    def torch_answers(peer: Any) -> Answers:
        result = answers(peer, inputs)
        if right is not inputs:
            other = answers(peer, right)
            result |= {name: other[name] for name in reads_first_token(head) & result.keys()}
        return result

    with true_float64():
        float64 = torch_answers(model.float64)
    oracles = ("", float64), (", .double()", torch_answers(model.float64))
    hold_all(model, family, inputs, torch_answers(model.torch), *oracles)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("masks", [False, True], ids=["plain", "masks"])
@pytest.mark.parametrize("token_dropout", [False, True], ids=["", "token_dropout"])
@pytest.mark.parametrize("head", CLASSES.values())
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs(
    get_peers: Callable[..., Peers], family: str, head: str, token_dropout: bool, masks: bool, padding: str
) -> None:
    lengths = LENGTHS * (2 if HEADS[head][0] == "ForSequenceClassification" else 1)  # few elements per row: more rows
    inputs, right = (batch(side, masks, lengths=lengths) for side in (padding, "right"))
    model = get_peers(family, head, token_dropout=token_dropout)
    hold_peers(model, family, head, inputs, right if padding == "left" else inputs)


def test_padding_without_attention_mask(get_peers: Callable[..., Peers]) -> None:
    """Padding is computed like other tokens, but has no position."""
    inputs = {"input_ids": batch("right")["input_ids"]}
    hold_peers(get_peers("ESM-1b", "model"), "ESM-1b", "model", inputs, inputs)


def test_stored_frequencies(get_peers: Callable[..., Peers]) -> None:
    """The checkpoint's frequencies are used; they may have been rounded in training."""
    model = copy.deepcopy(get_peers("ESM-2"))
    before = model.mlx(**batch()).logits
    for peer in model[1:]:
        peer.esm.rotary_embeddings.inv_freq.data = peer.esm.rotary_embeddings.inv_freq.bfloat16().to(peer.dtype)
    model.mlx.load_state_dict(model.torch.state_dict())
    assert not close(model.mlx(**batch()).logits, before, 1e-4)
    hold_peers(model, "ESM-2", "lm", batch(), batch())


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_position_ids(get_peers: Callable[..., Peers], family: str, rows: int) -> None:
    inputs = batch("right")
    length = inputs["input_ids"].shape[1]
    inputs["position_ids"] = np.random.default_rng(0).integers(0, 40, (rows, length))
    model = get_peers(family, "model")
    without_positions = answers(model.mlx, batch("right"))["last_hidden_state"][0]
    assert not close(answers(model.mlx, inputs)["last_hidden_state"][0], without_positions, 1e-3)
    hold_peers(model, family, "model", inputs, inputs)


@pytest.mark.parametrize("head", ["model", "lm", "token", "regressions"])
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_embeds(get_peers: Callable[..., Peers], family: str, head: str) -> None:
    model = get_peers(family, head)
    mask = batch("right")["attention_mask"]
    embeds = np.random.default_rng(0).normal(size=(*mask.shape, model.mlx.config.hidden_size)).astype(np.float32)
    inputs = {"inputs_embeds": embeds, "attention_mask": mask}
    hold_peers(model, family, head, inputs, inputs)


def losses(model: Any, batches: list[dict[str, Any]]) -> list[float]:
    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            return [float(model(**for_torch(inputs, model)).loss) for inputs in batches]
    return [model(**inputs).loss.item() for inputs in batches]


def hold_losses(model: Peers, family: str, batches: list[dict[str, Any]]) -> None:
    """Compare several losses as one output: the error of a single number depends on luck."""
    ours, float32 = losses(model.mlx, batches), losses(model.torch, batches)
    with true_float64():
        float64 = losses(model.float64, batches)
    hold(type(model.mlx).__name__, "loss", family, ours, float32, float64)


@pytest.mark.parametrize("head", WITH_LOSS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss(get_peers: Callable[..., Peers], family: str, head: str) -> None:
    hold_losses(get_peers(family, head), family, [batch("right", seed % 2 == 0, seed, head) for seed in range(8)])


def test_loss_of_many_tokens(get_peers: Callable[..., Peers]) -> None:
    """The mean over 16,000 tokens is accurate only if they are not added sequentially."""
    batches = [batch(seed=seed, head="token", lengths=(100,) * 160) for seed in range(2)]
    hold_losses(get_peers("ESM-2", "token"), "ESM-2", batches)


@pytest.mark.parametrize("head", ["single_label", "multi_label", "regression"])
def test_problem_type_is_inferred(get_peers: Callable[..., Peers], tmp_path: Path, head: str) -> None:
    model = peers(tmp_path, "ESM-2", head, problem_type=None)
    given = get_peers("ESM-2", head)
    inputs = batch("right", head=head)
    assert model.mlx.config.problem_type is None
    loss = model.mlx(**inputs).loss.item()
    model.torch(**for_torch(inputs, model.torch))
    assert loss == given.mlx(**inputs).loss.item()
    assert model.mlx.config.problem_type == model.torch.config.problem_type == given.mlx.config.problem_type


@pytest.mark.parametrize("head", ["lm", "token", "single_label"])
def test_ignored_labels(get_peers: Callable[..., Peers], head: str) -> None:
    """-100 is excluded from the loss; with no other label the loss is NaN, as in torch."""
    model = get_peers("ESM-2", head)
    inputs = batch("right", head=head)
    kept = inputs["labels"] != -100
    logits = np.array(model.mlx(**inputs).logits, dtype=np.float64)[kept]
    picked = logits[np.arange(kept.sum()), inputs["labels"][kept]]
    assert 0 < kept.sum() < kept.size
    assert np.isclose(model.mlx(**inputs).loss.item(), (np.log(np.exp(logits).sum(-1)) - picked).mean(), rtol=1e-5)
    inputs["labels"] = np.full_like(inputs["labels"], -100)
    assert np.isnan(model.mlx(**inputs).loss.item()) and model.torch(**for_torch(inputs, model.torch)).loss.isnan()


@pytest.mark.parametrize("head", ["lm", "token"])
def test_labels_at_padding_count(get_peers: Callable[..., Peers], head: str) -> None:
    """As in transformers, labels at padding take part in the loss: many scripts pass `labels=input_ids`."""
    model = get_peers("ESM-2", head)
    inputs = batch("right", head=head)
    inputs["labels"] = inputs["input_ids"] % model.torch.config.num_labels if head == "token" else inputs["input_ids"]
    expected = model.torch(**for_torch(inputs, model.torch)).loss.item()
    assert np.isclose(model.mlx(**inputs).loss.item(), expected, rtol=1e-5)


def layout(value: Any) -> Any:
    """Return shapes, without transformers' empty tuple of cross_attentions."""
    if isinstance(value, tuple):
        return tuple(layout(x) for x in value if not isinstance(x, tuple) or x)
    return tuple(value.shape)


@pytest.mark.parametrize(
    "flags", [(), ("output_hidden_states",), ("output_attentions",), ("output_hidden_states", "output_attentions")]
)
@pytest.mark.parametrize("head", CLASSES.values())
def test_tuples(get_peers: Callable[..., Peers], head: str, flags: tuple[str, ...]) -> None:
    """return_dict=False returns transformers' tuple; arguments and config fields have the same effect."""
    model = get_peers("ESM-2", head)
    inputs = batch("right", head=head)
    asked = dict.fromkeys(flags, True)
    ours = model.mlx(**inputs, **asked, return_dict=False)
    with torch.no_grad():
        assert layout(ours) == layout(model.torch(**for_torch(inputs, model.torch), **asked, return_dict=False))
    output = model.mlx(**inputs, **asked)
    by_config = type(model.mlx)(config("ESM-2", head, **asked, return_dict=False)).eval()
    by_config.load_state_dict(model.mlx.state_dict())
    for other in output.to_tuple(), by_config(**inputs):
        assert layout(other) == layout(ours)
        assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(tree_flatten(other), tree_flatten(ours), strict=True))
    off = dict.fromkeys(flags, False)
    assert layout(by_config(**inputs, **off)) == layout(model.mlx(**inputs).to_tuple())


@pytest.mark.parametrize("add_pooling_layer", [False, True])
def test_pooling_layer(add_pooling_layer: bool) -> None:
    output = MLXEsmModel(config("ESM-2"), add_pooling_layer=add_pooling_layer)(batch("none")["input_ids"])
    assert list(output) == ["last_hidden_state"] + ["pooler_output"] * add_pooling_layer


# Against fair-esm

PROTEINS = ("MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "KALTARQQEVFDLIRD", "MXBUZO.-W", "G", "MKT<mask>YIAKQR<mask>ISF")
LONG = tuple("".join(np.random.default_rng(n).choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in (300, 207))
FAIR_ESM = {
    "ESM-1": {},
    "ESM-1, no token dropout": {"token_dropout": False},
    "ESM-1, no final bias": {"token_dropout": False, "final_bias": False},
    "ESM-1b": {},
    "ESM-1v": {},
    "ESM-2": {},
    "ESM-2, no token dropout": {"token_dropout": False},
}


@pytest.fixture(scope="session")
def vocab_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """fair-esm's vocabulary of ESM-1b, ESM-1v and ESM-2."""
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(get_fair_esm_peers("ESM-2").torch.alphabet.all_toks))
    return str(file)


@pytest.mark.parametrize("sequences", [PROTEINS, LONG], ids=["mixed", "long"])
@pytest.mark.parametrize("case", FAIR_ESM)
def test_fair_esm(vocab_file: str, case: str, sequences: tuple[str, ...]) -> None:
    family = case.partition(",")[0]
    model = get_fair_esm_peers(family, **FAIR_ESM[case])
    alphabet = fair_esm.Alphabet.from_architecture("ESM-1" if family == "ESM-1" else "ESM-1b")
    tokenizer = Esm1Tokenizer() if family == "ESM-1" else EsmTokenizer(vocab_file)
    inputs = dict(tokenizer(list(sequences), padding=True, return_tensors="np"))
    tokens = alphabet.get_batch_converter()([("", sequence) for sequence in sequences])[2].numpy()
    assert (inputs["input_ids"] == tokens).all()
    assert (inputs["attention_mask"] == (tokens != alphabet.padding_idx)).all()

    with true_float64():
        float64 = fair_esm_answers(model.float64, tokens)
    oracles = (", fair-esm", float64), (", fair-esm .double()", fair_esm_answers(model.float64, tokens))
    hold_all(model, case, inputs, fair_esm_answers(model.torch, tokens), *oracles)


# Gradients


def mlx_gradients(model: Any, inputs: dict[str, Any], loss: Callable) -> dict[str, np.ndarray]:
    model.train()
    gradients = nn.value_and_grad(model, lambda: loss(model, inputs))()[1]
    model.eval()
    return {name: np.array(gradient) for name, gradient in tree_flatten(gradients)}


def torch_gradients(model: Any, inputs: dict[str, Any], loss: Callable) -> dict[str, np.ndarray]:
    model.zero_grad()
    model.train()
    loss(model, for_torch(inputs, model)).backward()
    model.eval()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return from_fair_esm(gradients) if isinstance(model, fair_esm.ProteinBertModel) else gradients


def hold_gradients(
    model: Peers, family: str, batches: list[dict[str, Any]], loss: Callable, torch_loss: Callable
) -> None:
    """Compare several batches as one, as with losses: some parameters are a single number."""

    def stack(gradients: Callable, peer: Any, loss: Callable) -> dict[str, np.ndarray]:
        of_batches = [gradients(peer, inputs, loss) for inputs in batches]
        return {name: np.stack([of_batch[name] for of_batch in of_batches]) for name in of_batches[0]}

    ours, float32 = stack(mlx_gradients, model.mlx, loss), stack(torch_gradients, model.torch, torch_loss)
    with true_float64():
        float64 = stack(torch_gradients, model.float64, torch_loss)
    contact_head = {name for name in ours if "contact_head" in name}
    assert len(contact_head) == 2 and not any(ours[name].any() for name in contact_head)
    assert float32.keys() == ours.keys() - contact_head
    for name in float32:
        # Softmax cancels what the key's bias adds to all scores of a query. Its gradient is a difference of numbers of
        # the size of the weight's gradient, and is only rounding error unless positions are rotated.
        scale = np.abs(float64[name.replace("key.bias", "key.weight")]).max()
        hold(type(model.mlx).__name__, "gradients", f"{family} {name}", ours[name], float32[name], float64[name], scale)


def own_loss(model: Any, inputs: dict[str, Any]) -> Any:
    return model(**inputs).loss


@pytest.mark.parametrize("head", WITH_LOSS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(get_peers: Callable[..., Peers], family: str, head: str) -> None:
    hold_gradients(
        get_peers(family, head), family, [batch(seed=seed, head=head) for seed in range(4)], own_loss, own_loss
    )


def test_gradients_of_many_tokens(get_peers: Callable[..., Peers]) -> None:
    inputs = batch(head="lm", lengths=(90, 70) * 5)
    hold_gradients(get_peers("ESM-2"), "ESM-2", [inputs], own_loss, own_loss)


def test_gradients_untied(tmp_path: Path) -> None:
    model = peers(tmp_path, "ESM-2", "lm", tie_word_embeddings=False)
    assert "lm_head.decoder.weight" in dict(model.mlx.named_parameters())
    hold_gradients(model, "ESM-2", [batch(head="lm")], own_loss, own_loss)


def test_gradients_esm1() -> None:
    def torch_loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(inputs["input_ids"])["logits"]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())

    model = get_fair_esm_peers("ESM-1")
    hold_gradients(model, "ESM-1", [batch(seed=seed, head="lm") for seed in range(4)], own_loss, torch_loss)


# Properties

few = settings(derandomize=True, max_examples=10, database=None)
bodies = st.lists(st.lists(st.sampled_from([*RESIDUES, MASK]), min_size=1, max_size=20), min_size=1, max_size=4)


def with_ends(family: str, body: list[int]) -> list[int]:
    return [32, *(33 if token == MASK else token for token in body)] if family == "ESM-1" else [CLS, *body, EOS]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_row_does_not_depend_on_its_batch(get_model: Callable[[str], Any], family: str) -> None:
    """Each row has the same outputs as alone, whatever the order, side and amount of padding."""
    model = get_model(family)

    @few
    @given(bodies, st.sampled_from(["left", "right"]), st.integers(0, 5))
    def check(rows: list[list[int]], side: str, extra: int) -> None:
        rows = [with_ends(family, row) for row in rows]
        inputs = with_mask(rows, side, extra)
        together = answers(model, inputs)
        for i, (row, real) in enumerate(zip(rows, inputs["attention_mask"].astype(bool), strict=True)):
            for name, layers in answers(model, {"input_ids": np.array([row])}).items():
                for one, other in zip(layers, (layer[i] for layer in together[name]), strict=True):
                    if name == "contacts":
                        other = other[: one.shape[1], : one.shape[2]]  # top left, whichever side the padding is on
                    elif name == "attentions":
                        assert np.abs(other[:, real][..., ~real]).max(initial=0) < 1e-37
                        other = other[:, real][..., real]
                    else:
                        other = other[real]
                    assert close(other, one[0]), (name, i)

    check()


NOTHING = {
    "padding": lambda length: ([PAD] * length, [0] * length),
    "masks": lambda length: ([MASK] * length, [1] * length),
    "masks and padding": lambda length: ([MASK] * (length - 2) + [PAD] * 2, [1] * (length - 2) + [0] * 2),
}


@pytest.mark.parametrize("row", NOTHING)
@pytest.mark.parametrize("head", CLASSES.values())
@pytest.mark.parametrize("family", FAMILIES)
def test_row_without_residues(get_peers: Callable[..., Peers], family: str, head: str, row: str) -> None:
    """Its outputs are finite, unlike transformers' NaN, and other rows do not change."""
    model = get_peers(family, head).mlx
    inputs = batch()
    before = answers(model, inputs)
    ids, mask = NOTHING[row](inputs["input_ids"].shape[1])
    inputs = {name: np.array([*inputs[name], value]) for name, value in (("input_ids", ids), ("attention_mask", mask))}
    after = answers(model, inputs)
    for name, layers in after.items():
        for one, other in zip(layers, before[name], strict=True):
            assert np.isfinite(one).all(), name
            assert close(one[:-1], other), name


def test_row_without_residues_esm1() -> None:
    ids = np.array([[32, 5, 6, 7], [1, 1, 1, 1], [33, 33, 33, 33]])
    after = answers(get_fair_esm_peers("ESM-1").mlx, {"input_ids": ids, "attention_mask": ids != 1})
    assert all(np.isfinite(layer).all() for layers in after.values() for layer in layers)


@pytest.mark.parametrize("head", ["model", "single_label"])
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_is_right_padding(get_peers: Callable[..., Peers], family: str, head: str) -> None:
    model = get_peers(family, head).mlx
    left, right = (answers(model, batch(side)) for side in ("left", "right"))
    for name in reads_first_token(head) & left.keys():
        assert close(left[name][0], right[name][0]), name


# Inputs and outputs

CONTAINERS: dict[str, Callable[[np.ndarray], Any]] = {
    "mlx": mx.array,
    "int32": lambda x: x.astype(np.int32),
    "int64": lambda x: x.astype(np.int64),
    "list": lambda x: x.tolist(),
    "list of arrays": list,
    "torch": torch.from_numpy,
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("head", WITH_LOSS)
def test_containers(get_peers: Callable[..., Peers], head: str, kind: str) -> None:
    model = get_peers("ESM-2", head).mlx
    inputs = batch(head=head)
    inputs["position_ids"] = np.arange(inputs["input_ids"].shape[1])[None] + 3
    given = {name: CONTAINERS[kind](x) if x.dtype.kind == "i" else x for name, x in inputs.items()}
    output = model(**given, output_hidden_states=True, output_attentions=True)
    for (name, ours), (_, other) in zip(
        tree_flatten(output.to_tuple()),
        tree_flatten(model(**inputs, output_hidden_states=True, output_attentions=True).to_tuple()),
        strict=True,
    ):
        assert isinstance(ours, mx.array) and mx.array_equal(ours, other), name
    predict_contacts = model.base_model.predict_contacts
    assert mx.array_equal(predict_contacts(**for_contacts(given)), predict_contacts(**for_contacts(inputs)))


@pytest.mark.parametrize("dtype", [bool, np.float32, np.uint8])
def test_mask_dtypes(get_peers: Callable[..., Peers], dtype: Any) -> None:
    model = get_peers("ESM-1b").mlx
    inputs = batch()
    given = inputs | {"attention_mask": inputs["attention_mask"].astype(dtype)}
    assert mx.array_equal(model(**given).logits, model(**inputs).logits)
    assert mx.array_equal(model.predict_contacts(**for_contacts(given)), model.predict_contacts(**for_contacts(inputs)))


def for_contacts(inputs: dict[str, Any]) -> dict[str, Any]:
    """Convert a model's arguments to those of `predict_contacts`."""
    return {"tokens": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


def test_float_containers(get_peers: Callable[..., Peers]) -> None:
    model = get_peers("ESM-2", "regressions").mlx
    embeds = np.random.default_rng(0).normal(size=(2, 5, model.config.hidden_size)).astype(np.float32)
    labels = np.ones((2, 3), dtype=np.float32)
    losses = {
        model(inputs_embeds=convert(embeds), labels=convert(labels)).loss.item()
        for convert in (mx.array, np.array, np.ndarray.tolist, torch.from_numpy)
    }
    assert len(losses) == 1
    half = torch.from_numpy(embeds).bfloat16()
    rounded = model(inputs_embeds=half.float()).logits
    assert close(model(inputs_embeds=half).logits, rounded, 0.1)
    assert not close(model(inputs_embeds=embeds).logits, rounded, 1e-6)


# Methods


def build(family: str, head: str = "lm", **overrides: Any) -> Any:
    """Create a model with random weights, in evaluation mode, as if it had been loaded."""
    if family == "ESM-1":
        size = {**SIZE, **overrides}
        return as_loaded(MLXEsmForMaskedLM(MLXEsm1Config(**size))).eval()
    return as_loaded(getattr(mlx_esm_hf, f"MLXEsm{HEADS[head][0]}")(config(family, head, **overrides))).eval()


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def long(*values: Any) -> Any:
    """Mark slow parameters: on the CPU `mx.compile` calls the C++ compiler for each new kernel, one second each."""
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    "family, padding", [long("ESM-1", "left"), long("ESM-1b", "none"), long("ESM-1v", "right"), ("ESM-2", "left")]
)
def test_compile(family: str, padding: str) -> None:
    model = build(family, num_hidden_layers=1)
    inputs = {name: mx.array(x) for name, x in batch(padding).items()}

    def forward(inputs: dict[str, mx.array]) -> tuple:
        contacts = () if padding == "none" else (model.predict_contacts(**for_contacts(inputs)),)
        return (model(**inputs).logits, *contacts)

    for compiled, plain in zip(mx.compile(forward)(inputs), forward(inputs), strict=True):
        assert close(compiled, plain)


@pytest.mark.long
def test_compiled_training_step() -> None:
    inputs = {name: mx.array(x) for name, x in batch(head="lm").items()}
    start = build("ESM-2", num_hidden_layers=1).state_dict()

    def train(compiled: bool) -> list[float]:
        model = build("ESM-2", num_hidden_layers=1).train()
        model.load_state_dict(start)
        optimizer = SGD(0.1)

        def step(inputs: dict[str, mx.array]) -> mx.array:
            loss, gradients = nn.value_and_grad(model, lambda: model(**inputs).loss)()
            optimizer.update(model, gradients)
            return loss

        state = [model.state, optimizer.state]
        step = mx.compile(step, inputs=state, outputs=state) if compiled else step
        return [step(inputs).item() for _ in range(3)]

    plain = train(compiled=False)
    assert plain[2] < plain[1] < plain[0]
    assert np.allclose(train(compiled=True), plain, rtol=1e-5)


@pytest.mark.parametrize("head", ["model", "lm"])
def test_inv_freq_is_never_trained(head: str) -> None:
    model = build("ESM-2", head)
    frequencies = model.base_model.rotary_embeddings.inv_freq
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    assert np.allclose(frequencies, 10000 ** -(np.arange(0, head_dim, 2) / head_dim), rtol=1e-6)
    for thaw in (
        model.train,
        model.unfreeze,
        lambda: model.unfreeze(keys="inv_freq"),
        lambda: model.apply_to_modules(lambda _, m: m.unfreeze()),
    ):
        thaw()
        trainable = dict(tree_flatten(model.trainable_parameters()))
        assert parameters(model).keys() - trainable.keys() == {
            next(name for name in parameters(model) if "inv_freq" in name)
        }


DROPOUTS = {
    "hidden": ("model", {"hidden_dropout_prob": 0.5}),
    "attention": ("model", {"attention_probs_dropout_prob": 0.5}),
    "token classifier": ("token", {"hidden_dropout_prob": 0.5}),
}


@pytest.mark.parametrize("case", DROPOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout(family: str, case: str) -> None:
    head, settings = DROPOUTS[case]
    model, without = build(family, head, **settings), build(family, head)
    without.load_state_dict(model.state_dict())
    inputs = batch()
    plain = without(**inputs)[0]
    assert mx.array_equal(model(**inputs)[0], plain)
    assert mx.array_equal(without.train()(**inputs)[0], plain)
    model.train()
    if head != "model":
        model.esm.eval()  # keeps the head's dropout
    first, second = model(**inputs)[0], model(**inputs)[0]
    assert not close(first, second, 1e-3) and not close(first, plain, 1e-3)
    assert mx.array_equal(model.eval()(**inputs)[0], plain)


def test_dropout_of_classifier() -> None:
    """Dropout before and after the dense layer: half of the logits that depend on one feature are 0."""
    model = build("ESM-2", "single_label", hidden_dropout_prob=0.5)
    model.classifier.out_proj.weight = mx.eye(*model.classifier.out_proj.weight.shape)

    def logits() -> list[float]:
        return np.array(model([[CLS, 5, 6, EOS]] * 64).logits[:, 0]).round(5).tolist()

    assert len(set(logits())) == 1
    model.train()
    model.esm.eval()
    assert 16 < logits().count(0) < 48  # after the dense layer
    assert len(set(logits())) > 3  # before the dense layer


@pytest.mark.parametrize("head", CLASSES.values())
@pytest.mark.parametrize("family", FAMILIES)
def test_initialization(family: str, head: str) -> None:
    """Each parameter is initialized as in transformers."""
    std = 0.05
    model = build(family, head, initializer_range=std, hidden_size=96, intermediate_size=200)
    expected = getattr(transformers, f"Esm{HEADS[head][0]}")(model.config).state_dict()
    for name, value in model.state_dict().items():
        value, other = np.array(value), expected[name].numpy()
        if name.endswith("embeddings.weight"):
            assert not value[PAD].any() and not other[PAD].any()
            value, other = np.delete(value, PAD, 0), np.delete(other, PAD, 0)
        if other.std() == 0 or "inv_freq" in name:
            assert np.allclose(value, other), name
        else:
            tolerance = 5 * std / np.sqrt(2 * value.size)
            assert abs(value.std() - std) < tolerance and abs(other.std() - std) < tolerance, name
            assert abs(value.mean()) < 5 * std / np.sqrt(value.size), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("head", CLASSES.values())
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_match_transformers(family: str, head: str, tied: bool) -> None:
    model = build(family, head, tie_word_embeddings=tied)
    other = getattr(transformers, f"Esm{HEADS[head][0]}")(model.config)
    shapes = {name: tuple(p.shape) for name, p in other.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert {name: x.shape for name, x in model.state_dict().items()} == {
        name: tuple(x.shape) for name, x in other.state_dict().items()
    }
    model.base_model.encoder.freeze()
    model.base_model.embeddings.freeze()
    for part in other.base_model.encoder, other.base_model.embeddings:
        part.requires_grad_(False)
    counts = [
        [
            m.num_parameters(only_trainable=trainable, exclude_embeddings=exclude)
            for trainable in (False, True)
            for exclude in (False, True)
        ]
        for m in (model, other)
    ]
    assert counts[0] == counts[1] and len(set(counts[0])) >= 3


DTYPES = {
    "half": (lambda m: m.half(), mx.float16),
    "bfloat16": (lambda m: m.bfloat16(), mx.bfloat16),
    "string": (lambda m: m.to("float16"), mx.float16),
    "mlx": (lambda m: m.to(mx.bfloat16), mx.bfloat16),
    "torch": (lambda m: m.to(torch.float16), mx.float16),
    "keyword": (lambda m: m.to(dtype=torch.bfloat16), mx.bfloat16),
    "device and dtype": (lambda m: m.to("cuda:0", torch.float16), mx.float16),
    "and back": (lambda m: m.half().float(), mx.float32),
}


@pytest.mark.parametrize("case", DTYPES)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_dtypes(family: str, case: str) -> None:
    model = build(family)
    model.load_state_dict(model.state_dict() | {"lm_head.bias": mx.random.normal(model.lm_head.bias.shape)})
    inputs = batch()
    full = model(**inputs).logits
    cast, dtype = DTYPES[case]
    assert model.dtype == full.dtype == mx.float32
    assert cast(model) is model and model.dtype == dtype
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    for name, value in tree_flatten([output.to_tuple(), model.predict_contacts(**for_contacts(inputs))]):
        assert value.dtype == dtype, name
    assert close(output.logits.astype(mx.float32), full, 0.1)
    for name, value in parameters(model).items():
        assert value.dtype == (mx.float32 if "inv_freq" in name else dtype)


@pytest.mark.parametrize(
    "move", ["cuda", "mps", "cpu", "cuda:0", 0, torch.device("cuda", 0), torch.device("cpu"), mx.cpu]
)
def test_devices(move: Any) -> None:
    model = build("ESM-2")
    inputs = batch()
    before = model(**inputs).logits
    for moved in model.to(move), model.to(device=move), model.cuda(), model.cuda(0), model.cpu():
        assert moved is model
    assert model.device == mx.default_device() and model.dtype == mx.float32
    assert mx.array_equal(model(**inputs).logits, before)


@pytest.mark.parametrize("size", [40, 20], ids=["longer", "shorter"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_resize_token_embeddings(tmp_path: Path, tied: bool, size: int) -> None:
    model = peers(tmp_path, "ESM-2", "lm", tie_word_embeddings=tied, token_dropout=False).mlx
    kept = min(size, 33)
    inputs = {"input_ids": np.array([[0, 5, 6, 7, 2]])}
    before, table = model(**inputs).logits, np.array(model.get_input_embeddings().weight)
    assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    assert model.config.vocab_size == model.esm.config.vocab_size == size
    after = model(**inputs).logits
    assert after.shape == (1, 5, size) and close(after[..., :kept], before[..., :kept])
    assert np.allclose(after[..., 33:], before.mean(axis=-1, keepdims=True), atol=1e-5)
    new = np.array(model.get_input_embeddings().weight)
    assert np.array_equal(new[:kept], table[:kept]) and np.allclose(new[33:], table.mean(axis=0), atol=1e-6)
    assert mx.array_equal(model.lm_head.decoder.weight, model.get_input_embeddings().weight) == tied
    inputs["input_ids"][0, 1] = size - 1
    assert np.isfinite(model(**inputs).logits).all()
    with pytest.raises(ValueError, match=f"expected 0 to {size - 1}"):
        model(np.array([[0, size, 2]]))
    saved = {name: x.shape for name, x in model.state_dict().items()}
    fresh = build("ESM-2", vocab_size=size, tie_word_embeddings=tied)
    assert saved == {name: x.shape for name, x in fresh.state_dict().items()}


def test_resize_token_embeddings_to_multiple() -> None:
    model = build("ESM-1b", "model")
    assert model.resize_token_embeddings().weight.shape[0] == model.config.vocab_size == 33
    assert model.resize_token_embeddings(pad_to_multiple_of=8).weight.shape[0] == model.config.vocab_size == 40
    assert model.resize_token_embeddings(41, pad_to_multiple_of=16).weight.shape[0] == 48
    assert "lm_head.bias" not in parameters(model) and np.isfinite(model([[0, 47, 2]]).last_hidden_state).all()


@pytest.mark.parametrize("head", CLASSES.values())
def test_input_embeddings(head: str) -> None:
    model = build("ESM-2", head)
    table = model.get_input_embeddings()
    assert table is model.base_model.embeddings.word_embeddings
    inputs = batch()
    before = model(**inputs)[0]
    other = nn.Embedding(*table.weight.shape)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other and not close(model(**inputs)[0], before, 1e-3)
    model.set_input_embeddings(table)
    assert mx.array_equal(model(**inputs)[0], before)
    assert (model.get_output_embeddings() is None) == (head != "lm")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tied_weights(tied: bool) -> None:
    model = build("ESM-2", tie_word_embeddings=tied)
    inputs = batch()
    other = nn.Embedding(*model.get_input_embeddings().weight.shape)
    model.set_input_embeddings(other)
    assert mx.array_equal(model.get_output_embeddings().weight, other.weight) == tied
    model.update({"esm": {"embeddings": {"word_embeddings": {"weight": 2 * other.weight}}}})
    assert mx.array_equal(model.state_dict()["lm_head.decoder.weight"], other.weight) == tied
    before = model(**inputs).logits
    output = nn.Linear(model.config.hidden_size, 33, bias=False)
    model.set_output_embeddings(output)
    assert model.get_output_embeddings() is output and not close(model(**inputs).logits, before, 1e-3)
    model.tie_weights()
    assert mx.array_equal(model(**inputs).logits, before) == tied


# Errors


@pytest.mark.parametrize("option", ["is_decoder", "add_cross_attention"])
@pytest.mark.parametrize("head", CLASSES.values())
def test_unsupported_option(head: str, option: str) -> None:
    with pytest.raises(ValueError, match=f"(?i){option}=True is not supported.*set {option}=False"):
        build("ESM-2", head, **{option: True})


@pytest.mark.parametrize("head", CLASSES.values())
def test_folding_config(head: str) -> None:
    with pytest.raises(ValueError, match="This model is a folding model.*MLXEsmForProteinFolding"):
        build("ESM-2", head, is_folding_model=True)


@pytest.mark.parametrize("name", ["vocab_size", "pad_token_id", "mask_token_id"])
def test_incomplete_config(name: str) -> None:
    with pytest.raises(ValueError, match=f"must set .*{name}"):
        build("ESM-2", **{name: None})


def test_heads_do_not_divide_hidden_size() -> None:
    with pytest.raises(ValueError, match=r"hidden_size \(50\) must be a multiple .* \(4\)"):
        build("ESM-2", hidden_size=50, num_attention_heads=4)
