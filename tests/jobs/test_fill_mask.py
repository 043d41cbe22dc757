"""`fill_mask`."""

import csv

import numpy as np

from mlx_esm_hf import fill_mask
from tests.jobs.models import MASKED, UBIQUITIN, write_model


def test_csv_matches_the_arrays(folder, tmp_path):
    fill_mask([("a", MASKED), ("b", "<mask>KT")], folder, tmp_path / "f.csv", top_k=3)
    rows = list(csv.DictReader((tmp_path / "f.csv").open()))
    results = list(fill_mask([("a", MASKED), ("b", "<mask>KT")], folder, top_k=3))
    assert [int(row["position"]) for row in rows] == [6] * 3 + [7] * 3 + [8] * 3 + [1] * 3
    scores = np.concatenate([result.arrays["scores"].ravel() for result in results])
    np.testing.assert_allclose([float(row["score"]) for row in rows], scores)
    assert [int(row["rank"]) for row in rows] == [1, 2, 3] * 4


def test_protein_without_mask_is_left_out(folder, tmp_path):
    report = fill_mask([("a", "MKT"), ("b", "<mask>KT")], folder, tmp_path / "f.csv")
    assert report.left_out == ["record 1: 'a' has no <mask>."]
    assert {row["id"] for row in csv.DictReader((tmp_path / "f.csv").open())} == {"b"}


def test_truncated_mask_does_not_count(tmp_path):
    folder = str(write_model(tmp_path / "model", "ESM-1b", positions=34))  # 30 residues
    report = fill_mask([("a", UBIQUITIN + "<mask>"), ("b", "<mask>")], folder, tmp_path / "f.csv", long="truncate")
    assert report.left_out == ["record 1: 'a' has no <mask>."]
