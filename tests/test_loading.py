"""Matching, checking and reporting the keys of a checkpoint, compared with transformers."""

import mlx.core as mx
import numpy as np
import pytest
import transformers
from mlx.utils import tree_flatten

from mlx_esm_hf import MLXEsmForMaskedLM, MLXEsmModel
from mlx_esm_hf.errors import CheckpointError
from tests.checkpoints import (
    assert_close,
    assert_loads_as_transformers,
    config,
    edit_config,
    heard,
    ours,
    run,
    save,
    theirs,
    torch,
    torch_model,
    without,
    write,
)


@pytest.fixture
def folder(tmp_path):
    """An ESM-2 with its language-model head, saved by transformers 5."""
    save(torch_model(), tmp_path / "esm2")
    return tmp_path / "esm2"


def test_wrong_shapes(folder, tmp_path):
    with pytest.raises(RuntimeError) as error:
        MLXEsmForMaskedLM.from_pretrained(folder, vocab_size=40)
    for part in (
        f"Shapes differ between {folder} and MLXEsmForMaskedLM",
        "esm.embeddings.word_embeddings.weight: (33, 32) in the checkpoint, (40, 32) in the model",
        "lm_head.bias: (33,) in the checkpoint, (40,) in the model",
        "ignore_mismatched_sizes=True",
    ):
        assert part in str(error.value)

    edit_config(folder, vocab_size=40)
    with heard("mlx_esm_hf") as said:
        model = ours("Model").from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.get_input_embeddings().weight.shape == (40, 32)
    assert "embeddings.word_embeddings.weight | MISMATCH   | (33, 32) in the checkpoint, (40, 32) here" in said[0]


def test_another_number_of_labels(tmp_path):
    """The most common mismatch, a classifier for another task, is initialized and reported as in transformers."""
    task = "ForSequenceClassification"
    save(torch_model(task, num_labels=2), tmp_path)
    with pytest.raises(RuntimeError, match=r"classifier.out_proj.bias: \(2,\) in the checkpoint, \(5,\) in the model"):
        ours(task).from_pretrained(tmp_path, num_labels=5)
    infos = {
        model: make(task).from_pretrained(
            tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
        )[1]
        for model, make in (("ours", ours), ("theirs", theirs))
    }
    assert infos["ours"]["mismatched_keys"] == infos["theirs"]["mismatched_keys"]
    assert infos["ours"]["mismatched_keys"] == {
        ("classifier.out_proj.weight", (2, 32), (5, 32)),
        ("classifier.out_proj.bias", (2,), (5,)),
    }


def test_config_of_another_model(folder):
    transformers.BertConfig().save_pretrained(folder)
    with pytest.raises(ValueError, match=f"The config of {folder}: MLXEsmConfig expected model_type .* got 'bert'"):
        MLXEsmForMaskedLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="got 'bert'"):
        MLXEsmForMaskedLM.from_pretrained(folder, config=transformers.BertConfig())


@pytest.mark.parametrize("text", ["{", '{"vocab_size": 33', "\x00"])
def test_broken_config(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(OSError, match=f"config file at '{folder}/config.json' is not a valid JSON file"):
        MLXEsmForMaskedLM.from_pretrained(folder)


def test_incomplete_folders(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", folder):
        (path / "config.json").unlink(missing_ok=True)
        with pytest.raises(OSError, match=f"No config.json found in {path}"):
            MLXEsmForMaskedLM.from_pretrained(path)
    config().save_pretrained(tmp_path / "empty")
    with pytest.raises(
        OSError, match=f"{path.parent / 'empty'} contains no weights: none of model.safetensors, .*pytorch_"
    ):
        MLXEsmForMaskedLM.from_pretrained(tmp_path / "empty")
    with pytest.raises(OSError, match="no/such/folder"):
        MLXEsmForMaskedLM.from_pretrained("no/such/folder")


@pytest.mark.parametrize("hole", ["encoder.layer.1.output.dense.weight", "embeddings.word_embeddings.weight"])
def test_hole_in_the_encoder(hole, tmp_path):
    """It is an error; transformers initializes the missing parameters and only warns."""
    folder = write(tmp_path, without(hole)(torch_model("Model").state_dict(), ""))
    with pytest.raises(
        CheckpointError,
        match=f"{folder} lacks 1 parameters that MLXEsm.* requires, such as '(esm.)?{hole}'",
    ):
        MLXEsmForMaskedLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=f"'{hole}'"):
        MLXEsmModel.from_pretrained(folder)


def test_new_classifier_is_announced(folder):
    with heard("mlx_esm_hf") as said:
        model, info = ours("ForTokenClassification").from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert len(said) == 1 and f"MLXEsmForTokenClassification LOAD REPORT from: {folder}" in said[0]
    for row in ("classifier.bias ", "lm_head.dense.weight "):
        assert row in said[0]
    assert "MISSING: newly initialized" in said[0] and "UNEXPECTED: can be ignored" in said[0]
    assert run(model)["logits"].shape[-1] == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1 .* got 0"),
        ({"num_attention_heads": -4}, "num_attention_heads must be at least 1 .* got -4"),
        ({"intermediate_size": 0}, "intermediate_size must be at least 1 .* got 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1 .* got 0"),
        ({"vocab_size": 10**12}, "vocab_size must be at least 1 and below .* got 1000000000000"),
        ({"hidden_size": "32"}, "hidden_size.*expected int, got str"),
        ({"hidden_size": None}, "hidden_size.*expected int, got NoneType"),
        ({"id2label": 5}, "'int' object"),
        ({"id2label": {"helix": 0}}, "The config of .*'helix'"),
        ({"layer_norm_eps": None}, "layer_norm_eps must be positive, got None"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps must be positive, got -1.0"),
        ({"pad_token_id": 33}, "pad_token_id must be between 0 and 32, got 33"),
    ],
)
def test_odd_config(fields, message, folder):
    edit_config(folder, **fields)
    with pytest.raises(ValueError, match=message):
        MLXEsmForMaskedLM.from_pretrained(folder)


@pytest.mark.parametrize("text", ["3", "null", '"text"', "[1]"])
def test_config_without_fields(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises((OSError, ValueError), match="config.json"):
        MLXEsmForMaskedLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_hidden_layers": 10**8}, CheckpointError, "the config has 100000000 layers, the checkpoint 3"),
        ({"hidden_size": 10**12}, RuntimeError, "word_embeddings.weight: .33, 32. in the checkpoint"),
    ],
)
def test_config_of_another_size_is_refused_before_building_a_model(fields, error, message, folder):
    edit_config(folder, **fields)
    with pytest.raises(error, match=message):
        MLXEsmForMaskedLM.from_pretrained(folder)


def test_state_dict_instead_of_files(folder):
    (folder / "model.safetensors").unlink()
    theirs = torch_model()
    model, info = MLXEsmForMaskedLM.from_pretrained(folder, state_dict=theirs.state_dict(), output_loading_info=True)
    assert not any(info[kind] for kind in info if kind != "unexpected_keys")
    assert_close(run(model), run(theirs))


def test_absent_frequencies_are_computed(tmp_path):
    """They follow from the config and are not reported as missing, unlike in transformers."""
    folder = write(tmp_path, without("inv_freq")(torch_model().state_dict(), "esm."))
    with heard("mlx_esm_hf") as said:
        model, info = MLXEsmForMaskedLM.from_pretrained(folder, output_loading_info=True)
    torch_model_, torch_info = theirs("ForMaskedLM").from_pretrained(folder, output_loading_info=True)
    assert torch_info["missing_keys"] == {"esm.rotary_embeddings.inv_freq"}
    assert info["missing_keys"] == set() and not said
    assert_close(run(model), run(torch_model_))


def test_separate_decoder(tmp_path):
    """A stored output projection that differs from the embeddings is used, even if the config ties them."""
    state = torch_model().state_dict() | {"lm_head.decoder.weight": torch.randn(33, 32)}
    folder = write(tmp_path, state)
    with heard("mlx_esm_hf") as said:
        model = assert_loads_as_transformers(folder, "ForMaskedLM")
    assert len(said) == 1 and "they are not tied" in said[0]
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "reloaded")
    reloaded = theirs("ForMaskedLM").from_pretrained(tmp_path / "reloaded")
    assert torch.equal(reloaded.lm_head.decoder.weight, state["lm_head.decoder.weight"])


def test_decoder_replaces_a_missing_embedding(tmp_path):
    """A file may hold either of two tied tensors. A base model has no decoder; see `test_hole_in_the_encoder`."""
    write(tmp_path, without("word_embeddings")(torch_model().state_dict(), "esm."))
    assert_loads_as_transformers(tmp_path, "ForMaskedLM")


@pytest.mark.parametrize("tied", [True, False])
def test_config_ties_weights(tied, tmp_path):
    save(torch_model(tie_word_embeddings=tied), tmp_path)
    model = assert_loads_as_transformers(tmp_path, "ForMaskedLM")
    assert ("lm_head.decoder.weight" in dict(tree_flatten(model.parameters()))) is not tied
    assert "lm_head.decoder.weight" in model.state_dict()


KEY = "esm.encoder.layer.1.output.dense.weight"


def set_value(folder, value, key=KEY):
    path = str(folder / "model.safetensors")
    arrays = {name: np.array(array) for name, array in mx.load(path).items()}
    arrays[key].flat[3] = value
    mx.save_safetensors(path, {name: mx.array(x) for name, x in arrays.items()}, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "1 of its 2,048 values are NaN or infinite"),
        (np.inf, "1 of its 2,048 values are NaN or infinite"),
        (-np.inf, "1 of its 2,048 values are NaN or infinite"),
        (1e30, r"it has values up to 1e\+30, whose squares overflow"),
    ],
)
def test_damaged_values(value, message, folder):
    set_value(folder, value)
    with pytest.raises(
        CheckpointError, match=f"{folder}: '{KEY}' is damaged: {message}. Download the checkpoint again"
    ):
        MLXEsmForMaskedLM.from_pretrained(folder)
    MLXEsmForMaskedLM.from_pretrained(folder, lazy=True)  # reads no weights


def test_values_that_overflow_in_the_requested_dtype(folder):
    set_value(folder, -1e6)
    with pytest.raises(
        CheckpointError, match=f"'{KEY}' has values up to 1e.06, which overflow in float16. Use float32"
    ):
        MLXEsmForMaskedLM.from_pretrained(folder, dtype="float16")
    for dtype in ("float32", "bfloat16"):
        MLXEsmForMaskedLM.from_pretrained(folder, dtype=dtype)
