"""Outputs at padding are 0 on every device, or transformers' values if the caller asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_esm_hf import Esm1Tokenizer
from mlx_esm_hf.ops import dispatch, gpu
from tests import parity
from tests.models.esmc import peers as esmc

HEADS = ("model", "lm", "token")


def load(folder: Path, family: str, head: str) -> parity.Peers:
    return esmc.peers(folder, head) if family == "ESMC" else parity.peers(folder, family, head)


def outputs_at_padding(model: Any, inputs: dict[str, Any], **options: Any) -> dict[str, np.ndarray]:
    """Return {output: [tokens, D]} of the padding of a batch."""
    output = model(**inputs, output_hidden_states=True, **options)
    padding = np.asarray(inputs["attention_mask"]) == 0
    states = {f"hidden_states[{i}]": x for i, x in enumerate(output.hidden_states)}
    main = {name: output[name] for name in ("last_hidden_state", "logits") if name in output}
    return {name: parity.as_numpy(x)[padding] for name, x in (states | main).items()}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["ESM-1b", "ESM-2", "ESMC"])
def test_outputs_at_padding(family: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tmp_path, family, head)
    inputs = parity.batch("right", head=head)
    unlabelled = {name: x for name, x in inputs.items() if name != "labels"}
    with torch.no_grad():
        theirs = outputs_at_padding(model.torch, parity.for_torch(unlabelled, model.torch))

    def all_outputs() -> list[dict[str, np.ndarray]]:
        return [
            outputs_at_padding(model.mlx, unlabelled),
            outputs_at_padding(model.mlx, unlabelled, output_attentions=True),
            outputs_at_padding(model.mlx, inputs),
        ]

    def hold_zero() -> None:
        for found in all_outputs():
            for name, x in found.items():
                assert x.size and not x.any(), name

    def hold_theirs() -> None:
        for found in all_outputs():
            assert found.keys() == theirs.keys()
            for name, x in found.items():
                np.testing.assert_allclose(
                    x, theirs[name], rtol=0, atol=1e-4 * np.abs(theirs[name]).max(), err_msg=name
                )

    hold_zero()
    model.mlx.compute_padding = True
    hold_theirs()
    monkeypatch.setattr(dispatch, "backend_of", lambda *arrays: gpu)
    hold_theirs()
    model.mlx.compute_padding = False
    hold_zero()
    assert any(x.any() for x in theirs.values())


@pytest.mark.usefixtures("backend")
def test_padding_of_esm1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other values than fair-esm's, whose embeddings are not 0 at padding; the logits of residues are its own."""
    model = parity.fair_esm_peers("ESM-1")
    inputs = dict(Esm1Tokenizer()(["MKTAYI<mask>KQR", "LSDED"], padding=True, return_tensors="np"))
    expected, real = (
        parity.fair_esm_answers(model.torch, inputs["input_ids"])["logits"][0],
        inputs["attention_mask"] > 0,
    )
    assert not any(x.any() for x in outputs_at_padding(model.mlx, inputs).values())
    model.mlx.compute_padding = True
    found = outputs_at_padding(model.mlx, inputs)
    assert found["logits"].any(axis=-1).all()
    np.testing.assert_allclose(parity.as_numpy(model.mlx(**inputs).logits)[real], expected[real], atol=1e-4)
    monkeypatch.setattr(dispatch, "backend_of", lambda *arrays: gpu)
    for name, x in outputs_at_padding(model.mlx, inputs).items():
        np.testing.assert_allclose(x, found[name], rtol=0, atol=1e-4 * np.abs(found[name]).max(), err_msg=name)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("family", ["ESM-2", "ESMC"])
def test_means_over_all_positions(family: str, tmp_path: Path) -> None:
    """A script that averages over padding gets the same answer from a compiled model."""
    model = load(tmp_path, family, "lm").mlx
    inputs = {name: mx.array(x) for name, x in parity.batch("right").items()}

    def mean(inputs: dict[str, mx.array]) -> mx.array:
        return model(**inputs).logits.mean(axis=1)

    assert mx.allclose(mx.compile(mean)(inputs), mean(inputs), atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("family", ["ESM-2", "ESMC"])
def test_labels_at_padding_take_part_in_the_loss(family: str, tmp_path: Path) -> None:
    """Also with outputs that are 0 there, compiled and not."""
    model = load(tmp_path, family, "lm")
    inputs = parity.batch("right", head="lm")
    inputs["labels"] = inputs["input_ids"]
    expected = model.torch(**parity.for_torch(inputs, model.torch)).loss.item()
    assert model.mlx(**inputs).loss.item() == pytest.approx(expected, rel=1e-5)
    arrays = {name: mx.array(x) for name, x in inputs.items()}
    loss = mx.compile(lambda arrays: model.mlx(**arrays).loss)(arrays)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
