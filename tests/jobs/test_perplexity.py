"""`perplexity`."""

import csv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_esm_hf import perplexity
from mlx_esm_hf.jobs.perplexity import one_pass
from tests.jobs.models import (
    UBIQUITIN,
    fair_esm_log_probabilities,
    fair_esm_pair,
    fair_esm_tokens,
)


@pytest.mark.parametrize("family", ["ESM-1", "ESM-1b", "ESM-2"])
def test_pseudo_perplexity_matches_fair_esm(family):
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


def test_one_pass_estimate_is_the_same_in_both_methods(loaded):
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
    report = perplexity([("a", "MKTAYI"), ("b", "XX"), ("c", "MX")], folder, tmp_path / "p.csv")
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [(row["id"], row["length"]) for row in rows] == [("a", "6"), ("c", "2")]
    assert all(float(row["pseudo_perplexity"]) > 1 for row in rows)
    assert "'b' has no residue that counts" in report.left_out[0]
