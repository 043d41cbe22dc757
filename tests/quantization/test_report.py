"""The conversion report: every number is compared with torch and scipy."""

import numpy as np
import pytest
import torch
import transformers
from scipy import stats
from transformers import AutoTokenizer

from mlx_esm_hf import convert
from mlx_esm_hf.models.auto import MLXAutoModel, MLXAutoModelForMaskedLM
from mlx_esm_hf.quantization.report import compare, protein_to_scan, same_contacts, spearman, table
from tests.jobs.models import UBIQUITIN, write_model

PROTEINS = [UBIQUITIN, "MKTAYIAKQR", "GG", "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"]
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a language model, its 3-bit version, and that version dequantized for torch."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "original")
    convert(folder / "original", folder / "quantized", quantize=True, bits=3, group_size=32)
    convert(folder / "quantized", folder / "plain", dequantize=True)
    return folder


@pytest.fixture(scope="module")
def figures(folder):
    return compare(MLXAutoModelForMaskedLM, str(folder / "original"), str(folder / "quantized"), "main", PROTEINS)


@pytest.fixture(scope="module")
def peers(folder):
    """Return both models in torch, and the tokenizer."""
    options = {"attn_implementation": "eager"}
    models = [
        transformers.EsmForMaskedLM.from_pretrained(folder / name, **options).eval() for name in ("original", "plain")
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder / "original")
    return models, tokenizer


@torch.no_grad()
def test_embeddings(figures, peers):
    models, tokenizer = peers
    states = []
    for model in models:
        ids = [torch.tensor([tokenizer(sequence)["input_ids"]]) for sequence in PROTEINS]
        states.append([model.base_model(x).last_hidden_state[0, 1:-1].double() for x in ids])
    for name, a, b in (
        ("residue", *map(torch.cat, states)),
        ("protein", *(torch.stack([x.mean(0) for x in found]) for found in states)),
    ):
        cosines = torch.nn.functional.cosine_similarity(a, b)
        expected = {"mean": cosines.mean().item(), "min": cosines.min().item()}
        assert figures[f"{name}_cosine"] == pytest.approx(expected, abs=1e-5)
        assert expected["min"] < 0.999
    assert (figures["proteins"], figures["residues"]) == (4, sum(map(len, PROTEINS)))


@torch.no_grad()
def test_predictions(figures, peers):
    models, tokenizer = peers
    deltas, same, seen, likelihoods = [], [], [], ([], [])
    for sequence in PROTEINS:
        ids = torch.tensor([tokenizer(sequence)["input_ids"]])
        places = [1 + place for place in range(min(8, len(sequence)) // 2, len(sequence), 8)]
        masked = ids.clone()
        masked[0, places] = tokenizer.mask_token_id
        a, b = (model(masked).logits[0].log_softmax(-1)[places] for model in models)
        deltas.append((a - b).abs())
        same.append(a.argmax(-1) == b.argmax(-1))
        for found, rows in zip(likelihoods, (a, b), strict=True):
            found.append(rows[range(len(places)), ids[0, places]])
        a, b = (model(ids).logits[0, 1:-1] for model in models)
        seen.append(a.argmax(-1) == b.argmax(-1))
    agreement = {name: torch.cat(found).float().mean().item() for name, found in (("masked", same), ("seen", seen))}
    assert figures["same_best_residue"] == pytest.approx(agreement)
    assert 0 < agreement["masked"] < 1 and 0 < agreement["seen"] < 1
    assert figures["log_probability_difference"] == pytest.approx(torch.cat(deltas).mean().item(), rel=1e-3)
    before, after = (torch.cat(found).mean().neg().exp().item() for found in likelihoods)
    assert figures["pseudo_perplexity"] == pytest.approx({"before": before, "after": after}, rel=1e-3)


@torch.no_grad()
def test_mutations(figures, peers):
    """Scan the longest protein of at most 128 residues, each position masked in turn."""
    models, tokenizer = peers
    ids, mutants = tokenizer(UBIQUITIN)["input_ids"], tokenizer.convert_tokens_to_ids(list(RESIDUES))
    rows = torch.tensor([ids] * len(UBIQUITIN))
    places = torch.arange(len(UBIQUITIN))
    rows[places, places + 1] = tokenizer.mask_token_id
    effects = []
    for model in models:
        found = model(rows).logits.log_softmax(-1)[places, places + 1].numpy()
        wild_types = np.array(ids[1:-1])
        effects.append((found[:, mutants] - found[places, wild_types][:, None])[mutants != wild_types[:, None]])
    assert figures["mutations"]["count"] == 19 * len(UBIQUITIN)
    expected = stats.spearmanr(*effects).statistic
    assert figures["mutations"]["spearman"] == pytest.approx(expected, abs=1e-4) and expected < 0.999


@torch.no_grad()
def test_contacts(figures, peers):
    models, tokenizer = peers
    for name, part in (("L/5", 0.2), ("L/2", 0.5), ("L", 1)):
        shares = []
        for sequence in (protein for protein in PROTEINS if len(protein) > 6):
            ids = torch.tensor([tokenizer(sequence)["input_ids"]])
            i, j = np.triu_indices(len(sequence), 6)
            count = max(1, round(min(len(sequence), len(i)) * part))
            maps = [model.predict_contacts(ids, torch.ones_like(ids))[0].numpy() for model in models]
            tops = [set(np.argsort(-found[i, j], kind="stable")[:count].tolist()) for found in maps]
            shares.append(len(tops[0] & tops[1]) / count)
        assert figures["same_contacts"][name] == pytest.approx(np.mean(shares)), name
    assert figures["same_contacts"]["L"] < 1


def test_memory_and_speed(figures, folder):
    before, after = figures["before"], figures["after"]
    assert after["weights_bytes"] < before["weights_bytes"] < before["peak_bytes"]
    assert before["peak_bytes"] > 5e7  # includes the whole process
    assert before["residues_per_second"] > 0 and after["residues_per_second"] > 0


def test_identical_models(folder):
    figures = compare(MLXAutoModelForMaskedLM, *[str(folder / "original")] * 2, "main", PROTEINS)
    assert figures["residue_cosine"] == figures["protein_cosine"] == pytest.approx({"mean": 1, "min": 1}, abs=1e-7)
    assert figures["same_best_residue"] == {"masked": 1, "seen": 1} and figures["log_probability_difference"] == 0
    assert figures["mutations"]["spearman"] == pytest.approx(1)
    assert figures["same_contacts"] == {"L/5": 1, "L/2": 1, "L": 1}
    assert ("same contacts among the top L/5", "", "100.00%") in table(figures)


def test_failure_names_the_model(folder):
    with pytest.raises(RuntimeError, match=r"The report failed on .*nowhere: .*nowhere"):
        compare(MLXAutoModel, str(folder / "nowhere"), str(folder / "original"), "main", PROTEINS)


def test_spearman_with_ties():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 10, (2, 200)).astype(np.float32)
    assert spearman(a, a + b) == pytest.approx(stats.spearmanr(a, a + b).statistic)


def test_same_contacts_averages_over_proteins():
    a = np.array([(0, 1, 9), (0, 2, 9), (3, 1, 8), (3, 1, 9)])
    b = np.array([(0, 2, 9), (0, 1, 9), (3, 1, 8), (3, 2, 9)])
    assert same_contacts(a, b, 1) == (1 + 0.5) / 2
    assert same_contacts(a, b, 0.5) == (0 + 1) / 2


def test_protein_to_scan():
    lengths = {(100, 128, 129): 128, (500, 200): 128, (3,): 3}
    for given, expected in lengths.items():
        assert len(protein_to_scan([np.arange(length) for length in given])) == expected
