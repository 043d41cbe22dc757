"""`score`."""

import csv
import itertools
import re
import weakref

import numpy as np
import pytest

from mlx_esm_hf import score
from mlx_esm_hf.data.proteins import STANDARD
from mlx_esm_hf.models.auto import Checkpoint
from tests.jobs.models import (
    UBIQUITIN,
    fair_esm_log_probabilities,
    fair_esm_pair,
    fair_esm_tokens,
    write_model,
)

WILD = UBIQUITIN[:20]


MUTANTS = ["M1A", "K6R", "Q2E:G10W", "L15L", "T7V:T9S:E18D"]


def fair_esm_score(method, model, alphabet, sequence, mutant):
    """Compute the score of fair-esm's predict.py, position by position."""
    index = alphabet.get_idx
    tokens = fair_esm_tokens(alphabet, sequence)
    parts = [re.fullmatch(r"(.)(\d+)(.)", part).groups() for part in mutant.split(":")]
    if method == "pseudo-perplexity":
        residues = list(sequence)
        for _, place, to in parts:
            residues[int(place) - 1] = to
        tokens = fair_esm_tokens(alphabet, "".join(residues))
        return sum(masked(model, alphabet, tokens, i)[index(r)] for i, r in enumerate(residues, 1))
    total = 0.0
    for wild, place, to in parts:
        place = int(place)
        if method == "masked-marginals":
            row = masked(model, alphabet, tokens, place)
        else:
            row = fair_esm_log_probabilities(model, tokens)[place]
        total += row[index(to)] - row[index(wild)]
    return total


def masked(model, alphabet, tokens, place):
    tokens = tokens.clone()
    tokens[0, place] = alphabet.mask_idx
    return fair_esm_log_probabilities(model, tokens)[place]


@pytest.mark.parametrize("method", ["masked-marginals", "wt-marginals", "pseudo-perplexity"])
@pytest.mark.parametrize("family", ["ESM-1", "ESM-1b", "ESM-1v", "ESM-2"])
def test_scores_match_fair_esm(family, method):
    model, alphabet, ours = fair_esm_pair(family)
    found = score(MUTANTS, WILD, ours, method=method)
    for mutant, row in zip(MUTANTS, found.rows, strict=True):
        assert row["mutant"] == mutant
        assert row[family] == pytest.approx(fair_esm_score(method, model, alphabet, WILD, mutant), abs=1e-4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [str(write_model(tmp_path_factory.mktemp(f"model{seed}"), seed=seed)) for seed in range(2)]


def test_table_keeps_its_columns_and_gains_scores_and_their_mean(models, tmp_path):
    table = tmp_path / "in.csv"
    table.write_text('name,mut,note\nx,M24A,"a, b"\ny,K29R,\nz,A24M,wrong\n', encoding="utf-8-sig")
    found = score(
        table, WILD, models, tmp_path / "out.csv", mutant_column="mut", first_residue=24, method="wt-marginals"
    )
    rows = list(csv.DictReader((tmp_path / "out.csv").open(newline="")))
    assert list(rows[0]) == ["name", "mut", "note", *models, "mean"]
    assert [row["note"] for row in rows] == ["a, b", "", "wrong"]
    for row in rows[:2]:
        assert float(row["mean"]) == pytest.approx(np.mean([float(row[m]) for m in models]))
    assert rows[2]["mean"] == rows[2][models[0]] == ""
    assert len(found.left_out) == 1 and "row 3: A24M: the sequence has M at 24, not A" in found.left_out[0]
    plain = score(["M1A", "K6R"], WILD, models[1], method="wt-marginals")
    assert [float(row[models[1]]) for row in rows[:2]] == [row[models[1]] for row in plain.rows]
    assert [p.name for p in tmp_path.iterdir() if "shards" in p.name or "part" in p.name] == []


def test_first_residue_is_suggested(models):
    with pytest.raises(ValueError, match="No mutant matches the sequence. More would match with --first-residue 101"):
        score(["M101A", "Q102A", "K106R"], WILD, models[0])


def test_scan_covers_all_residues_at_all_positions(models, tmp_path):
    picture = tmp_path / "map.png"
    found = score(None, WILD, models[0], tmp_path / "scan.csv", picture=picture)
    assert [row["mutant"] for row in found.rows] == [
        f"{wild}{place}{to}" for (place, wild), to in itertools.product(enumerate(WILD, 1), STANDARD)
    ]
    unchanged = [row[models[0]] for row in found.rows if row["mutant"][0] == row["mutant"][-1]]
    assert unchanged == [0] * len(WILD)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    one = score(["K6R"], WILD, models[0])
    scan = {row["mutant"]: row[models[0]] for row in found.rows}
    assert scan["K6R"] == pytest.approx(one.rows[0][models[0]], abs=1e-5)


@pytest.mark.parametrize(
    ("fasta", "message"),
    [
        (">a\nMKTAYI\n>b\nMK1\n", "line 3: 'b' has '1' at position 3"),
        (">a\nMK-TAYI\n", "The wild type has 1 gaps"),
        (">a\nMKTAYI\n>b\nMKT\n", "contains 2 proteins"),
    ],
)
def test_wild_type_with_bad_records_is_refused(fasta, message, tmp_path):
    (tmp_path / "wild.fasta").write_text(fasta)
    with pytest.raises(ValueError, match=message):
        score(["M1A"], tmp_path / "wild.fasta", "no model is loaded")


def test_replaced_letters_of_the_wild_type_are_counted(tmp_path):
    (tmp_path / "wild.fasta").write_text(">a\nMKJAYIJ\n")
    model = str(write_model(tmp_path / "model"))
    assert score(["M1A"], tmp_path / "wild.fasta", model).replaced == 2
    assert score(["M1A"], "MKJAYI", model).replaced == 1


def test_long_wild_type_in_windows(tmp_path):
    folder = str(write_model(tmp_path, "ESM-1b", positions=34))  # 30 residues
    with pytest.raises(ValueError, match="accepts at most 30"):
        score(["M1A"], UBIQUITIN, folder)
    for method in ("masked-marginals", "wt-marginals"):
        row = score(["M1A"], UBIQUITIN, folder, method=method, long="window").rows[0]
        plain = score(["M1A"], UBIQUITIN[:30], folder, method=method).rows[0]
        assert row[folder] == pytest.approx(plain[folder], abs=1e-4)


def test_mutant_beyond_a_truncated_wild_type_is_left_out(tmp_path):
    folder = str(write_model(tmp_path, "ESM-1b", positions=34))
    found = score(["M1A", f"{UBIQUITIN[40]}41A"], UBIQUITIN, folder, long="truncate", method="wt-marginals")
    assert folder in found.rows[0] and folder not in found.rows[1]
    assert found.left_out == [f"row 2: {folder} reads only the first 30 residues."]


def test_columns_are_not_overwritten(models, tmp_path):
    (tmp_path / "in.csv").write_text("mutant,mean\nM1A,mine\n")
    with pytest.raises(ValueError, match="would be named 'mean'"):
        score(tmp_path / "in.csv", WILD, models, tmp_path / "out.csv")


def test_output_is_not_overwritten(models, tmp_path):
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(ValueError, match="already exists"):
        score(["M1A"], WILD, models[0], tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "mine"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("a,b\n1,2\n", "No column 'mutant'"),
        ("mutant,b\nM1A\n", "line 2: expected 2 columns"),
        ("mutant,mutant\nM1A,M1A\n", "two columns are named 'mutant'. Rename one"),
        ("", "No column 'mutant'"),
        ("mutant\nhello\n", "is not a mutation. Expected one such as A42G"),
        ("mutant\nM1A:M1C\n", "mutated twice"),
        ("mutant\nM1J\n", "J is not a residue"),
    ],
)
def test_bad_tables(models, tmp_path, table, message):
    (tmp_path / "in.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        score(tmp_path / "in.csv", WILD, models[0])


@pytest.mark.parametrize("method", ["masked-marginals", "wt-marginals", "pseudo-perplexity"])
def test_only_one_model_is_in_memory_at_a_time(models, tmp_path, monkeypatch, method):
    """When a model is loaded, earlier models have been freed."""
    load, alive = Checkpoint.load, []

    def watched(checkpoint, **options):
        assert [network for network in alive if network() is not None] == []
        network = load(checkpoint, **options)
        alive.append(weakref.ref(network))
        return network

    monkeypatch.setattr(Checkpoint, "load", watched)
    score(MUTANTS, WILD, [*models, str(write_model(tmp_path / "third", seed=2))], tmp_path / "o.csv", method=method)
    score(MUTANTS, WILD, models, method=method)
    assert len(alive) == 5


def test_table_with_an_empty_first_line(tmp_path):
    (tmp_path / "mutants.csv").write_text("\nmutant\nM1A\n")
    with pytest.raises(ValueError, match="No column 'mutant' in .*: its first line is empty"):
        score(tmp_path / "mutants.csv", "MKTAYI", "no model is loaded")


def test_no_model():
    with pytest.raises(ValueError, match="model must be a model or a list of at least one, got none"):
        score(["M1A"], "MKT", [])
