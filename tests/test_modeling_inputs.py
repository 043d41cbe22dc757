"""Errors about the arguments of a forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import BatchEncoding

from mlx_esm_hf.errors import UserError
from tests.models.esm.test_modeling_esm import CLASSES, build
from tests.parity import PAD

IDS = [[0, 5, 6, 2], [0, 7, 2, 1]]

EMBEDS = np.zeros((2, 4, 32), dtype=np.float32)

BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "id outside": (
        {"input_ids": [[0, 33, 2]]},
        r"input_ids\[0, 1\] is 33, expected 0 to 32",
    ),
    "negative id": ({"input_ids": [[0, 5, 2], [0, 4, -1]]}, r"input_ids\[1, 2\] is -1, expected 0 to 32"),
    "longer than the table": (
        {"input_ids": [[0] + [PAD] * 38, [4] * 39]},
        r"Row 1 has 39 tokens, .* room for 38, including special tokens",
    ),
    "positions outside": ({"input_ids": IDS, "position_ids": [[0, 1, 2, 40]]}, "between 0 and 39, .* got 0 to 40"),
    "negative positions": ({"input_ids": IDS, "position_ids": [[-1, 1, 2, 3]]}, "between 0 and 39, .* got -1 to 3"),
    "positions' shape": (
        {"input_ids": IDS, "position_ids": [[1, 2, 3]]},
        r"position_ids must have shape .* got \(1, 3\)",
    ),
    "empty batch": ({"input_ids": np.zeros((0, 4), dtype=int)}, r"batch must not be empty, got shape \(0, 4\)"),
    "empty rows": ({"input_ids": np.zeros((2, 0), dtype=int)}, r"batch must not be empty, got shape \(2, 0\)"),
    "ragged rows": ({"input_ids": [[0, 5, 2], [0, 2]]}, "same length: tokenize with padding=True"),
    "one row": ({"input_ids": [0, 5, 2]}, r"must have shape \[batch, length\], got \(3,\)"),
    "broken ids": ({"input_ids": [[0.5, 2.0]]}, "must be integers, got mlx.core.float32"),
    "mask's shape": (
        {"input_ids": IDS, "attention_mask": [[1, 1, 1, 1]]},
        r"shape of the input, \(2, 4\), got \(1, 4\)",
    ),
    "additive mask": (
        {"input_ids": IDS, "attention_mask": [[1, 1, 1, 1], [1, 1, 1, -9]]},
        "1 for tokens and 0 for padding",
    ),
    "fractions in the mask": (
        {"input_ids": IDS, "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0.5]]},
        "1 for tokens and 0 for",
    ),
    "no inputs": ({}, "exactly one of input_ids or inputs_embeds"),
    "both": ({"input_ids": IDS, "inputs_embeds": EMBEDS}, "exactly one of input_ids or inputs_embeds"),
    "embeddings' width": ({"inputs_embeds": EMBEDS[..., 1:]}, r"\[batch, length, 32\], got \(2, 4, 31\)"),
    "mask of embeddings": (
        {"inputs_embeds": EMBEDS, "attention_mask": [[1] * 3] * 2},
        r"shape of the input, \(2, 4\), got \(2, 3\)",
    ),
}


NO_NUMBERS: list[tuple[Any, str]] = [
    ("MKTAYI", r"got the text \['MKTAYI'\]. Tokenize sequences first: .* model\(\*\*inputs\)"),
    (["MKT", "MKTAYI"], "got the text .* Tokenize sequences first"),
    (b"MKT", "got the text .* Tokenize sequences first"),
    ({"input_ids": IDS}, r"got a dict. Unpack what a tokenizer returns: model\(\*\*inputs\)"),
    (BatchEncoding({"input_ids": IDS}), r"got a BatchEncoding. Unpack"),
    ([[5, None]], r"Expected an array of numbers, got \[\[5, None\]\]"),
    (np.array([[5]], object), r"Expected an array of numbers, got \[\[5\]\]"),
    ([[2**70]], "Expected an array of numbers"),
    (np.array(["2020-01-01"], "M8[D]"), "Expected an array of numbers, got datetime64"),
    (np.array([[5]], np.longdouble), "Expected an array of numbers, got float128"),
    ({5, 6}, "Expected an array of numbers"),
    (5, r"must have shape \[batch, length\], got \(\)"),
    ([[[5]]], r"must have shape \[batch, length\], got \(1, 1, 1\)"),
    ([5, 6], r"For a batch of one sequence, pass \[input_ids\]"),
    ([[True]], "must be integers, got mlx.core.bool"),
]


@pytest.mark.parametrize(("given", "message"), NO_NUMBERS, ids=lambda value: str(type(value).__name__))
def test_what_is_no_array_of_ids_is_refused(given: Any, message: str) -> None:
    """Also as the mask, and by contact prediction."""
    model = build("ESM-2", "model")
    for use in (model, lambda x: model.predict_contacts(x, None)):
        with pytest.raises(UserError, match=message):
            use(given)
    if "numbers" in message or "text" in message:
        with pytest.raises(UserError, match=message):
            model(IDS, given)


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("head", CLASSES.values())
def test_bad_inputs(head: str, case: str) -> None:
    inputs, message = BAD_INPUTS[case]
    model = build("ESM-1b", head, hidden_size=32)
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize("family", ["ESM-1", "ESM-2"])
def test_sequence_length_is_unlimited(family: str) -> None:
    assert np.isfinite(build(family)([[4] * 60]).logits).all()


BAD_LABELS: dict[str, tuple[str, Any, str]] = {
    "token outside": ("lm", [[5, 33, 5, 5], [-100] * 4], "must be 0 to 32, or -100 .* got 33"),
    "negative": ("token", [[1, 2, -1, 0], [-100] * 4], "must be 0 to 2, .* got -1"),
    "class outside": ("single_label", [0, 5], "must be 0 to 4, .* got 5"),
    "shape": ("token", [[1, 2, 0]], r"must have shape \(2, 4\) for logits \(2, 4, 3\), got \(1, 3\)"),
    "number of rows": ("single_label", [1, 1, 1], r"must have shape \(2,\) for logits \(2, 5\), got \(3,\)"),
    "fractions": ("single_label", [0.5, 1.0], "must be integers, got mlx.core.float32"),
    "one label for several": (
        "multi_label",
        [[1.0], [0.0]],
        r"shape \(2, 4\) for a multi_label_classification loss, got \(2, 1\)",
    ),
    "too few numbers": ("regressions", [1.0, 2.0], r"shape \(2, 3\) for a regression loss, got \(2,\)"),
    "too many numbers": ("regression", [1.0, 2.0, 3.0], r"shape \(2,\) for a regression loss, got \(3,\)"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels(case: str) -> None:
    head, labels, message = BAD_LABELS[case]
    with pytest.raises(ValueError, match=message):
        build("ESM-2", head)(IDS, labels=labels)
