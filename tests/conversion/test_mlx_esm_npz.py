"""Converting weights of the first MLX port, compared with its network in NumPy."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from conversion import mlx_esm_npz
from conversion.check import mlx_esm
from conversion.mlx_esm_npz import ALPHABET, convert
from mlx_esm_hf import MLXAutoModelForMaskedLM, embed, fill_mask, generate, perplexity
from mlx_esm_hf.data.proteins import RESIDUES, STANDARD
from mlx_esm_hf.errors import CheckpointError
from tests.checkpoints import heard
from tests.parity import hold

PROTEIN = "MRAGRGGVPGSGGLRAPPPPLLXBZUOAMLPAAAPR"
# Token ids and logits of two sequences, computed in float32 by mlx-esm with the weights it ships (MIT license).
RECORDED = Path(__file__).with_name("mlx_esm_reference.npz")


def random_weights(layers=3, D=32, F=80):
    random = np.random.default_rng(0)
    weights = {"embed_tokens.weight": random.normal(size=(32, D)), "out.weight": random.normal(size=(32, D))}
    weights["out.bias"] = random.normal(size=32)
    for i in range(layers):
        layer = f"transformer_layers.layers.{i}"
        for name in ("query_proj", "key_proj", "value_proj", "out_proj"):
            weights[f"{layer}.self_attn.{name}.weight"] = 0.3 * random.normal(size=(D, D))
            weights[f"{layer}.self_attn.{name}.bias"] = 0.2 * random.normal(size=D)
        for name, shape in (("fc1", (F, D)), ("fc2", (D, F))):
            weights[f"{layer}.{name}.weight"] = 0.3 * random.normal(size=shape)
            weights[f"{layer}.{name}.bias"] = 0.2 * random.normal(size=shape[0])
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            weights[f"{layer}.{name}.weight"] = 1 + 0.2 * random.normal(size=D)
            weights[f"{layer}.{name}.bias"] = 0.2 * random.normal(size=D)
    return {name: array.astype(np.float32) for name, array in weights.items()}


WEIGHTS = random_weights()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlx-esm")
    np.savez(folder / "weights.npz", **WEIGHTS)
    convert(folder / "weights.npz", folder / "converted")
    return folder / "converted"


def in_float64(weights):
    return {name: array.astype(np.float64) for name, array in weights.items()}


def test_outputs(folder):
    """Logits and the states of every layer are equal, for one sequence and for a batch of two."""
    model, tokenizer = MLXAutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sequences = [PROTEIN, PROTEIN[:9] + "***" + PROTEIN[12:20]]
    output = model(**tokenizer(sequences, padding=True, return_tensors="np"), output_hidden_states=True)
    for i, sequence in enumerate(sequences):
        ids = np.array([ALPHABET.index(token) for token in f"^{sequence}$"])
        assert tokenizer(sequence)["input_ids"] == ids.tolist()
        alone = model(ids[None], output_hidden_states=True)
        single, double = mlx_esm(WEIGHTS, ids), mlx_esm(in_float64(WEIGHTS), ids)
        for ours, row in ((alone, 0), (output, i)):
            arrays = {"logits": ours.logits, **{f"layer {i}": x for i, x in enumerate(ours.hidden_states)}}
            assert arrays.keys() == double.keys()
            for name, array in arrays.items():
                values = np.array(array)[row, : len(ids)], single[name], double[name]
                hold("MLXEsmForMaskedLM, NumPy", name, "mlx-esm, converted", *values)


def test_tokenizer(folder):
    with heard("transformers") as said:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    assert said == []
    assert tokenizer.convert_ids_to_tokens(range(32)) == list(ALPHABET)
    special = [tokenizer.pad_token, tokenizer.cls_token, tokenizer.mask_token, tokenizer.eos_token, tokenizer.unk_token]
    assert special == list("%^*$?") and set(RESIDUES) <= set(ALPHABET)
    assert tokenizer("M*J")["input_ids"] == [ALPHABET.index(token) for token in "^M*?$"]


def test_no_contact_head(folder):
    with heard("mlx_esm_hf") as said:
        model = MLXAutoModelForMaskedLM.from_pretrained(folder)
    assert said == []  # it refuses when it is used
    with pytest.raises(ValueError, match="The checkpoint had no contact_head"):
        model.predict_contacts(np.array([[31, 6, 7, 1]]), np.ones((1, 4), int))


def test_jobs(folder):
    """Jobs accept ordinary sequences with <mask>, and a residue that is not in the alphabet becomes X."""
    proteins = [("a", "MKT<mask>YIAKQR"), ("b", "mkjt*")]
    (filled,) = fill_mask(proteins[:1], str(folder), top_k=3)
    logits = mlx_esm(in_float64(WEIGHTS), np.array([ALPHABET.index(token) for token in "^MKT*YIAKQR$"]))["logits"][4]
    assert filled.arrays["positions"].tolist() == [3]
    assert filled.arrays["tokens"].tolist() == [np.argsort(-logits)[:3].tolist()]

    (design,) = generate(proteins[:1], str(folder))
    assert design.sequence[:3] + design.sequence[4:] == "MKTYIAKQR" and design.sequence[3] in STANDARD

    masked, plain = embed(proteins, str(folder))
    ids = np.array([ALPHABET.index(token) for token in "^MKXT$"])
    expected = mlx_esm(in_float64(WEIGHTS), ids)["layer 3"][1:-1].mean(axis=0)
    assert masked.arrays["mean"].shape == (32,)
    assert np.abs(plain.arrays["mean"] - expected).max() < 1e-5 * np.abs(expected).max()

    (result,) = perplexity([("b", "MKTW")], str(folder))
    losses = []
    for i in range(1, 5):
        ids = np.array([ALPHABET.index(token) for token in "^MKTW$"])
        residue, ids[i] = ids[i], ALPHABET.index("*")
        logits = mlx_esm(in_float64(WEIGHTS), ids)["logits"][i]
        losses.append(np.log(np.exp(logits).sum()) - logits[residue])
    # The losses of random weights are about 57, where a rounding error of float32 (2⁻²⁴) is 3e-6. The exponential turns
    # it into a relative error of the perplexity, so the losses are compared: 1e-6 is 17 rounding errors.
    loss = np.log(result.arrays["pseudo_perplexity"].astype(np.float64))
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_tokens.weight": None}, "does not contain the weights of mlx-esm"),
        ({"embed_tokens.weight": np.ones((33, 32), np.float32)}, "expected 32 tokens, .* got 33"),
        ({"embed_tokens.weight": np.ones(32, np.float32)}, "does not contain the weights of mlx-esm"),
        ({"transformer_layers.layers.1.fc1.bias": None}, "missing keys: .*layer.1.intermediate.dense.bias"),
        ({"transformer_layers.layers.1.fc1.bias": np.ones(3, np.float32)}, "shapes differ"),
        ({"more": np.ones(3, np.float32)}, "unexpected keys: .*more"),
        ({"embed_tokens.weight": np.array([{}])}, "not an .npz file of plain arrays.*No code from it was run"),
    ],
)
def test_other_weights_are_refused(tmp_path, change, message):
    weights = {name: array for name, array in (WEIGHTS | change).items() if array is not None}
    np.savez(tmp_path / "weights.npz", **weights)
    with pytest.raises(CheckpointError, match=rf"weights\.npz(.|\n)*{message}"):
        convert(tmp_path / "weights.npz", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04", b"\x80\x04N."])
def test_other_files_are_refused(tmp_path, content, monkeypatch):
    path = tmp_path / "weights.npz"
    path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["mlx_esm_npz.py", str(path), str(tmp_path / "converted")])
    with pytest.raises(SystemExit, match=r"error: .*weights\.npz is not an \.npz file of plain arrays"):
        mlx_esm_npz.main()


@pytest.mark.long
def test_the_weights_shipped_with_mlx_esm(tmp_path):
    """Logits equal those computed by mlx-esm."""
    if "MLX_ESM_SEED_WEIGHTS" not in os.environ:
        pytest.skip("set MLX_ESM_SEED_WEIGHTS to the path of weights/esm1-202402151405.npz of usmanm/mlx-esm")
    path = Path(os.environ["MLX_ESM_SEED_WEIGHTS"])
    convert(path, tmp_path)
    model, tokenizer = MLXAutoModelForMaskedLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    weights = in_float64(dict(np.load(path)))
    with np.load(RECORDED) as recorded:
        for i in range(2):
            ids, theirs = recorded[f"tokens_{i}"], recorded[f"logits_{i}"]
            ours, double = np.array(model(ids[None]).logits[0]), mlx_esm(weights, ids)["logits"]
            hold("MLXEsmForMaskedLM, mlx-esm", "logits", "mlx-esm, as shipped", ours, theirs, double)
        ids = recorded["tokens_0"]
    sequence = "".join(tokenizer.convert_ids_to_tokens(ids[1:-1].tolist()))
    assert sequence.count("***") == 1 and tokenizer(sequence)["input_ids"] == ids.tolist()
    (filled,) = fill_mask([("x", sequence.replace("*", "<mask>"))], str(tmp_path), top_k=1)
    assert tokenizer.convert_ids_to_tokens(filled.arrays["tokens"][:, 0].tolist()) == ["A", "A", "A"]
