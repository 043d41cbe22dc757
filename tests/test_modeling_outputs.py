"""Outputs behave like transformers' `ModelOutput`."""

import pytest
import transformers

from tests.models.esm.test_modeling_esm import build
from tests.parity import batch


def test_repr_has_shapes_instead_of_numbers() -> None:
    output = build("ESM-2")([[0, 5, 2]], output_hidden_states=True, output_attentions=True)
    lines = repr(output).splitlines()
    assert lines[0] == "MLXMaskedLMOutput(" and lines[1].startswith("  logits=float32[1, 3, 3")
    assert [line.split("=")[0].strip() for line in lines[2:4]] == ["hidden_states", "attentions"]
    assert " x float32[1, 3, " in lines[2] and len(repr(output)) < 200


def test_model_output() -> None:
    model = build("ESM-2")
    inputs = batch(head="lm")
    output = model(**inputs)
    assert output.loss is output["loss"] is output[0] and output.logits is output["logits"] is output[1]
    assert isinstance(output, transformers.utils.ModelOutput) and list(output) == ["loss", "logits"]
    assert output.to_tuple() == output[:] and len(output.to_tuple()) == 2
    del inputs["labels"]
    output = model(**inputs)
    assert output.loss is None and output.hidden_states is None and output.attentions is None
    assert "loss" not in output and output[0] is output.logits
    with pytest.raises(KeyError):
        output["attentions"]
