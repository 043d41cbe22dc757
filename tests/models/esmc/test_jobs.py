"""Every job on a small ESMC, including proteins with several chains."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import transformers

from mlx_esm_hf import (
    EsmcTokenizer,
    LoraConfig,
    MLXAutoModelForMaskedLM,
    contacts,
    convert,
    embed,
    fill_mask,
    generate,
    load_adapter,
    perplexity,
    pipeline,
    score,
)
from mlx_esm_hf.data.proteins import STANDARD
from mlx_esm_hf.models.auto import MLXAutoModelForSequenceClassification
from mlx_esm_hf.training.adapters import add_adapters, merge_adapters
from mlx_esm_hf.training.finetune import finetune
from mlx_esm_hf.training.pretrain import pretrain
from tests.jobs.models import write_model
from tests.models.esmc.peers import torch_model

CHAINS = "MKTAYI|AKQR"
REAL = np.array([token != "|" for token in CHAINS])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("esmc")
    torch_model("lm", hidden_size=64, num_attention_heads=2, intermediate_size=96).save_pretrained(folder)
    EsmcTokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(folder: str) -> MLXAutoModelForMaskedLM:
    return MLXAutoModelForMaskedLM.from_pretrained(folder)


def ids_of(sequence: str) -> np.ndarray:
    """Return the ids of transformers' tokenizer, [1, tokens]."""
    return np.array([EsmcTokenizer()(sequence)["input_ids"]])


def log_probabilities(model, sequence: str) -> np.ndarray:
    """Return log-probabilities [positions, vocabulary] without <cls> and <eos>."""
    logits = np.array(model(ids_of(sequence)).logits[0, 1:-1], np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def masked(sequence: str, place: int) -> str:
    return f"{sequence[:place]}<mask>{sequence[place + 1 :]}"


def test_embed(folder: str, model) -> None:
    """Results have one row per residue, with its chain; pooling is over residues."""
    one, two = embed(["MKTA", CHAINS], folder, pooling=["residues", "mean", "max", "cls", "chains"])
    states = np.array(model.esmc(ids_of(CHAINS)).last_hidden_state[0])
    residues = states[1:-1][REAL]
    expected = {"residues": residues, "mean": residues.mean(axis=0), "max": residues.max(axis=0), "cls": states[0]}
    for name, array in expected.items():
        assert np.allclose(two.arrays[name], array, atol=1e-5 * np.abs(states).max()), name
    assert two.length == 10 and two.arrays["chains"].ravel().tolist() == [0] * 6 + [1] * 4
    assert one.arrays["residues"].shape == (4, 64) and one.arrays["chains"].tolist() == [[0]] * 4


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".safetensors", ".h5"])
def test_chains_in_files(tmp_path: Path, folder: str, suffix: str) -> None:
    fasta = tmp_path / "proteins.fasta"
    fasta.write_text(f">one\nMKTA\n>two\n{CHAINS}\n")
    embed(str(fasta), folder, tmp_path / f"out{suffix}", pooling=["residues", "chains"], layers=[0, -1])
    assert (tmp_path / f"out{suffix}").stat().st_size > 0
    if suffix == ".npz":
        with np.load(tmp_path / "out.npz") as file:
            assert file["ids"].tolist() == ["one", "two"] and file["offsets"].tolist() == [0, 4, 14]
            assert file["chains"].ravel().tolist() == [0] * 10 + [1] * 4 and file["residues.0"].shape == (14, 64)


def test_fill_mask(folder: str, model) -> None:
    """Positions count residues."""
    (result,) = fill_mask(["MKTAYI|A<mask>QR"], folder, top_k=3)
    row = log_probabilities(model, "MKTAYI|A<mask>QR")[8]
    assert result.arrays["positions"].tolist() == [7] and result.arrays["tokens"][0, 0] == row.argmax()
    assert np.allclose(result.arrays["scores"][0], np.sort(np.exp(row))[::-1][:3], rtol=1e-4)


@pytest.mark.parametrize("method", ["masked-marginals", "wt-marginals", "pseudo-perplexity"])
def test_score(folder: str, model, method: str) -> None:
    """Residue numbers continue across chains: A7 is the first residue of the second chain."""
    (row,) = score(["A7G"], CHAINS, folder, method=method).rows
    vocabulary = EsmcTokenizer().get_vocab()
    if method == "pseudo-perplexity":
        mutant = CHAINS.replace("|A", "|G")
        places = np.flatnonzero(REAL)
        expected = sum(log_probabilities(model, masked(mutant, p))[p, vocabulary[mutant[p]]] for p in places)
    else:
        seen = masked(CHAINS, 7) if method == "masked-marginals" else CHAINS
        answers = log_probabilities(model, seen)[7]
        expected = answers[vocabulary["G"]] - answers[vocabulary["A"]]
    assert np.isclose(row[folder], expected, rtol=1e-4)


def test_all_mutations(folder: str) -> None:
    scores = score(None, "MK|TA", folder, method="wt-marginals")
    assert [row["mutant"] for row in scores.rows] == [f"{a}{n}{b}" for n, a in enumerate("MKTA", 1) for b in STANDARD]
    assert not scores.left_out
    scores = score(["A15G", "R19W"], CHAINS, folder, method="wt-marginals", first_residue=9)
    assert scores.left_out == ["row 2: R19W: 19 is outside the sequence, 9 to 18."] and folder in scores.rows[0]


def test_perplexity(folder: str, model) -> None:
    """The separator between chains is not predicted."""
    (result,) = perplexity([CHAINS], folder)
    vocabulary = EsmcTokenizer().get_vocab()
    rows = [log_probabilities(model, masked(CHAINS, p))[p, vocabulary[CHAINS[p]]] for p in np.flatnonzero(REAL)]
    assert np.isclose(result.arrays["pseudo_perplexity"][0], np.exp(-np.mean(rows)), rtol=1e-4)


@pytest.mark.parametrize("order", ["confidence", "left-to-right", "gibbs"])
def test_generate(folder: str, order: str) -> None:
    """The separator stays, and `keep` counts residues."""
    (design,) = generate([CHAINS], folder, order=order, sweeps=1, fixed="1-3,7")
    assert len(design.sequence) == 11 and design.sequence[6] == "|"
    assert design.sequence[:3] == "MKT" and design.sequence[7] == "A" and "<mask>" not in design.sequence
    with pytest.warns(UserWarning, match="has 10 residues, so position 11"):
        assert not list(generate([CHAINS], folder, fixed="11"))


def test_contacts(folder: str) -> None:
    with pytest.raises(ValueError, match="has no contact head: a MLXEsmcModel does not predict contacts"):
        contacts([CHAINS], folder)


def test_other_families_have_no_chains(tmp_path: Path) -> None:
    write_model(tmp_path)
    with pytest.warns(UserWarning, match=r"'2' has '\|', for which .* has no token"):
        (result,) = embed(["MKTA", CHAINS], str(tmp_path))
    assert result.id == "1"


def test_convert(tmp_path: Path, folder: str) -> None:
    convert(folder, tmp_path / "quantized", quantize=True, bits=8)
    convert(str(tmp_path / "quantized"), tmp_path / "dequantized", dequantize=True)
    (before,), (quantized,), (dequantized,) = (
        list(embed([CHAINS], str(source))) for source in (folder, tmp_path / "quantized", tmp_path / "dequantized")
    )
    for after in quantized, dequantized:
        a, b = before.arrays["mean"], after.arrays["mean"]
        assert not np.array_equal(a, b) and a @ b > 0.99 * np.linalg.norm(a) * np.linalg.norm(b)
    assert np.allclose(quantized.arrays["mean"], dequantized.arrays["mean"], atol=1e-5 * np.abs(a).max())


def test_pipeline(folder: str) -> None:
    """The predictions are those of transformers' pipeline."""
    ours = pipeline("fill-mask", model=folder)("MKTAYI|A<mask>QR")
    theirs = transformers.pipeline("fill-mask", model=folder)("MKTAYI|A<mask>QR")
    assert [one["token"] for one in ours] == [one["token"] for one in theirs]
    assert np.allclose([one["score"] for one in ours], [one["score"] for one in theirs], rtol=1e-4)


def proteins(count: int) -> list[str]:
    random = np.random.default_rng(0)
    return ["".join(random.choice(list(STANDARD), 12)) + ("|MKTA" if n % 3 == 0 else "") for n in range(count)]


@pytest.mark.parametrize("train", ["lora", "dora", "full"])
def test_finetune(tmp_path: Path, folder: str, train: str) -> None:
    """By default adapters are added to query, key and value."""
    table = tmp_path / "table.csv"
    table.write_text("sequence,label\n" + "".join(f"{s},{'ab'[n % 2]}\n" for n, s in enumerate(proteins(24))))
    measured = finetune(table, tmp_path / "out", folder, train=train, num_train_epochs=1, metrics=["accuracy"])
    assert 0 <= measured["eval_accuracy"] <= 1
    if train == "lora":
        base = MLXAutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        plain = base([[0, 20, 15, 11, 2]]).logits
        tuned = merge_adapters(load_adapter(base, tmp_path / "out"))([[0, 20, 15, 11, 2]]).logits
        assert not mx.allclose(plain, tuned)


def test_adapters_change_nothing_yet(model, folder: str) -> None:
    adapted = add_adapters(
        MLXAutoModelForMaskedLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj", "down_proj"])
    )
    assert mx.allclose(adapted(ids_of(CHAINS)).logits, model(ids_of(CHAINS)).logits, atol=1e-4)
    assert {name.split(".")[-2] for name, _ in adapted.named_parameters() if "lora" in name} == {"lora_A", "lora_B"}


def test_train(tmp_path: Path, folder: str) -> None:
    fasta = tmp_path / "proteins.fasta"
    fasta.write_text("".join(f">{n}\n{s}\n" for n, s in enumerate(proteins(40))))
    pretrain([fasta], tmp_path / "out", folder, validation_share=0.2, max_steps=3)
    trained = MLXAutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    before = MLXAutoModelForMaskedLM.from_pretrained(folder)
    assert not mx.array_equal(trained.lm_head.decoder.bias, before.lm_head.decoder.bias)
    assert type(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) is EsmcTokenizer
