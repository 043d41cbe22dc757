"""fill-mask, perplexity and generate."""

import csv

import numpy as np
import pytest
from Bio import SeqIO
from hypothesis import given
from hypothesis import strategies as st

from mlx_esm_hf import MLXAutoModelForMaskedLM, fill_mask, generate, load_protein_model, perplexity
from mlx_esm_hf.data.proteins import STANDARD
from mlx_esm_hf.jobs.generate import Sampling, parse_positions
from mlx_esm_hf.jobs.perplexity import one_pass
from tests.jobs.models import (
    UBIQUITIN,
    fair_esm_log_probabilities,
    fair_esm_pair,
    fair_esm_tokens,
    write_model,
)

MASKED = UBIQUITIN[:5] + "<mask>" * 3 + UBIQUITIN[8:30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("esm2")))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_protein_model(MLXAutoModelForMaskedLM, folder)


@pytest.mark.parametrize("family", ["ESM-1", "ESM-1b", "ESM-2"])
def test_pseudo_perplexity_position_by_position(family):
    model, alphabet, ours = fair_esm_pair(family)
    sequences = ["MKTAYIXKQR", "GG", UBIQUITIN[:25]]
    for sequence, result in zip(sequences, perplexity(sequences, ours), strict=True):
        tokens, answers = fair_esm_tokens(alphabet, sequence), []
        for place, residue in enumerate(sequence, 1):
            if residue != "X":
                masked = tokens.clone()
                masked[0, place] = alphabet.mask_idx
                answers.append(fair_esm_log_probabilities(model, masked)[place, alphabet.get_idx(residue)])
        expected = np.exp(-np.mean(answers))
        assert result.arrays["pseudo_perplexity"][0] == pytest.approx(expected, rel=1e-4)


def test_one_pass_alone_is_the_estimate_beside_the_exact(loaded):
    (both,) = perplexity([UBIQUITIN], loaded)
    (alone,) = perplexity([UBIQUITIN], loaded, method="one-pass")
    assert list(both.arrays) == ["pseudo_perplexity", "one_pass_estimate"]
    assert list(alone.arrays) == ["one_pass_estimate"]
    np.testing.assert_array_equal(alone.arrays["one_pass_estimate"], both.arrays["one_pass_estimate"])


@given(st.floats(1e-6, 1))
def test_one_pass_inverts_the_corruption_of_training(p):
    kept, random = 0.1, 0.1  # of the tokens that have to be predicted
    seen = kept * p + random / 20  # how often the residue is seen, and how often it is then what was there
    u = p * (kept + random / 20) / seen
    assert np.exp(one_pass(np.log(np.array([u]))))[0] == pytest.approx(p, rel=1e-6)


def test_perplexity_csv(folder, tmp_path):
    perplexity([("a", "MKTAYI"), ("b", "XX")], folder, tmp_path / "p.csv")
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [(row["id"], row["length"]) for row in rows] == [("a", "6"), ("b", "2")]
    assert float(rows[0]["pseudo_perplexity"]) > 1 and rows[1]["pseudo_perplexity"] == "nan"


def test_fill_mask_csv_is_what_the_arrays_say(folder, tmp_path):
    fill_mask([("a", MASKED), ("b", "<mask>KT")], folder, tmp_path / "f.csv", top_k=3)
    rows = list(csv.DictReader((tmp_path / "f.csv").open()))
    results = list(fill_mask([("a", MASKED), ("b", "<mask>KT")], folder, top_k=3))
    assert [int(row["position"]) for row in rows] == [6] * 3 + [7] * 3 + [8] * 3 + [1] * 3
    scores = np.concatenate([result.arrays["scores"].ravel() for result in results])
    np.testing.assert_allclose([float(row["score"]) for row in rows], scores)
    assert [int(row["rank"]) for row in rows] == [1, 2, 3] * 4


def test_what_has_no_mask_is_left_out(folder, tmp_path):
    report = fill_mask([("a", "MKT"), ("b", "<mask>KT")], folder, tmp_path / "f.csv")
    assert report.left_out == ["record 1: 'a' has no <mask>."]
    assert {row["id"] for row in csv.DictReader((tmp_path / "f.csv").open())} == {"b"}


def test_a_mask_behind_the_cut_is_none(tmp_path):
    folder = str(write_model(tmp_path / "model", "ESM-1b", positions=34))  # 30 residues
    report = fill_mask([("a", UBIQUITIN + "<mask>"), ("b", "<mask>")], folder, tmp_path / "f.csv", long="truncate")
    assert report.left_out == ["record 1: 'a' has no <mask>."]


def test_length_goes_on_and_is_not_mixed(folder, tmp_path):
    generate(None, folder, tmp_path / "out", length=5)
    before = (tmp_path / "out" / "index.csv").stat().st_mtime_ns
    generate(None, folder, tmp_path / "out", length=5)
    assert (tmp_path / "out" / "index.csv").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="length: 5 there, 6 here"):
        generate(None, folder, tmp_path / "out", length=6)


@pytest.mark.parametrize("order", ["confidence", "left-to-right", "gibbs"])
def test_designs_keep_what_is_not_free(loaded, order):
    designs = list(generate([("a", MASKED)], loaded, samples=3, order=order, sweeps=2, seed=1))
    assert [(d.id, d.sample) for d in designs] == [("a", 1), ("a", 2), ("a", 3)]
    for design in designs:
        assert len(design.sequence) == 30
        assert design.sequence[:5] + design.sequence[8:] == UBIQUITIN[:5] + UBIQUITIN[8:30]
        assert set(design.sequence) <= set(STANDARD) and design.log_probability < 0
    assert len({d.sequence for d in designs}) > 1
    assert designs == list(generate([("a", MASKED)], loaded, samples=3, order=order, sweeps=2, seed=1))
    assert designs != list(generate([("a", MASKED)], loaded, samples=3, order=order, sweeps=2, seed=2))


def test_left_to_right_at_temperature_zero_takes_the_best_each_time(loaded):
    (design,) = generate(["MK<mask><mask>A"], loaded, order="left-to-right", temperature=0)
    ids = loaded.vocabulary.encode("MK<mask><mask>A")
    standard = [loaded.vocabulary.ids[residue] for residue in STANDARD]
    for place in (2, 3):
        row = loaded.blended_log_probabilities([ids])[0][place, standard]
        ids[place] = standard[row.argmax()]
    assert design.sequence == "".join(loaded.tokenizer.convert_ids_to_tokens(ids.tolist()))


def test_confidence_fills_the_surest_first(loaded):
    (design,) = generate(["MK<mask>YI<mask>A"], loaded, temperature=0)
    ids = loaded.vocabulary.encode("MK<mask>YI<mask>A")
    standard = [loaded.vocabulary.ids[residue] for residue in STANDARD]
    for _ in range(2):
        rows = loaded.blended_log_probabilities([ids])[0][:, standard]
        free = np.flatnonzero(ids == loaded.tokenizer.mask_token_id)
        place = max(free, key=lambda i: rows[i].max())
        ids[place] = standard[rows[place].argmax()]
    assert design.sequence == "".join(loaded.tokenizer.convert_ids_to_tokens(ids.tolist()))


def test_designs_do_not_depend_on_what_is_beside_them(loaded):
    alone = list(generate([("a", MASKED)], loaded, seed=3))
    beside = list(generate([("a", MASKED), ("b", "MK<mask>")], loaded, seed=3))
    assert beside[0].sequence == alone[0].sequence
    after = list(generate([("b", "MK<mask>"), ("a", MASKED)], loaded, seed=3))
    assert [d.sequence for d in after] == [d.sequence for d in reversed(beside)]


def test_fixed_positions_and_a_length(folder, tmp_path):
    generate([("u", UBIQUITIN)], folder, tmp_path / "d.fasta", fixed="1-70,76", samples=2)
    found = list(SeqIO.parse(tmp_path / "d.fasta", "fasta"))
    assert [record.id for record in found] == ["u_1", "u_2"]
    for record in found:
        assert str(record.seq)[:70] == UBIQUITIN[:70] and record.seq[75] == UBIQUITIN[75]
    (design,) = generate(None, folder, length=12)
    assert len(design.sequence) == 12
    with pytest.raises(ValueError, match="Either proteins or a length"):
        generate([UBIQUITIN], folder, length=12)
    report = generate([("short", "MKT"), ("u", UBIQUITIN)], folder, tmp_path / "e.fasta", fixed="76")
    assert report.left_out == ["record 1: 'short' has 3 residues, and none at 76, which is to be kept."]


@given(
    st.lists(st.floats(-20, 0), min_size=20, max_size=20),
    st.floats(0.1, 3),
    st.integers(0, 20),
    st.floats(0.01, 1),
    st.integers(0, 2**32),
)
def test_draws_are_among_those_allowed(values, temperature, top_k, top_p, seed):
    row = np.array(values)
    drawn = Sampling(temperature, top_k, top_p).draw(row, np.random.default_rng(seed))
    rank = (row > row[drawn]).sum()
    assert not top_k or rank < top_k
    p = np.exp(row / temperature)
    p /= p.sum()
    assert p[row > row[drawn]].sum() <= top_p + 1e-6 or top_k


def test_temperature_shapes_the_draws():
    row = np.log(np.array([0.6, 0.3, *[0.1 / 18] * 18]))
    random = np.random.default_rng(0)
    drawn = np.bincount([Sampling().draw(row, random) for _ in range(4000)], minlength=20) / 4000
    np.testing.assert_allclose(drawn[:2], [0.6, 0.3], atol=0.03)
    assert Sampling(temperature=0).draw(row, random) == 0
    assert {Sampling(top_p=0.5).draw(row, random) for _ in range(50)} == {0}
    assert {Sampling(top_k=2).draw(row, random) for _ in range(200)} == {0, 1}


@pytest.mark.parametrize("text", ["", "0", "3-1", "a", "1-", "1,,2", "-1"])
def test_lists_of_positions(text):
    with pytest.raises(ValueError, match="no list of positions"):
        parse_positions(text)
    assert parse_positions("1-3, 7").tolist() == [0, 1, 2, 6]
