"""`generate`."""

import numpy as np
import pytest
from Bio import SeqIO
from hypothesis import given
from hypothesis import strategies as st

from mlx_esm_hf import generate
from mlx_esm_hf.data.proteins import STANDARD
from mlx_esm_hf.jobs.generate import Sampling, parse_positions
from tests.jobs.models import MASKED, UBIQUITIN


def test_design_by_length_is_resumed_and_not_mixed(folder, tmp_path):
    generate(None, folder, tmp_path / "out", length=5)
    before = (tmp_path / "out" / "index.csv").stat().st_mtime_ns
    generate(None, folder, tmp_path / "out", length=5)
    assert (tmp_path / "out" / "index.csv").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="length: 5; now: 6"):
        generate(None, folder, tmp_path / "out", length=6)


@pytest.mark.parametrize("order", ["confidence", "left-to-right", "gibbs"])
def test_designs_keep_fixed_positions(loaded, order):
    designs = list(generate([("a", MASKED)], loaded, samples=3, order=order, sweeps=2, seed=1))
    assert [(d.id, d.sample) for d in designs] == [("a", 1), ("a", 2), ("a", 3)]
    for design in designs:
        assert len(design.sequence) == 30
        assert design.sequence[:5] + design.sequence[8:] == UBIQUITIN[:5] + UBIQUITIN[8:30]
        assert set(design.sequence) <= set(STANDARD) and design.log_probability < 0
    assert len({d.sequence for d in designs}) > 1
    assert designs == list(generate([("a", MASKED)], loaded, samples=3, order=order, sweeps=2, seed=1))
    assert designs != list(generate([("a", MASKED)], loaded, samples=3, order=order, sweeps=2, seed=2))


def test_left_to_right_at_temperature_zero_takes_the_most_probable(loaded):
    (design,) = generate(["MK<mask><mask>A"], loaded, order="left-to-right", temperature=0)
    ids = loaded.vocabulary.encode("MK<mask><mask>A")
    standard = [loaded.vocabulary.ids[residue] for residue in STANDARD]
    for place in (2, 3):
        row = loaded.blended_log_probabilities([ids])[0][place, standard]
        ids[place] = standard[row.argmax()]
    assert design.sequence == "".join(loaded.tokenizer.convert_ids_to_tokens(ids.tolist()))


def test_confidence_fills_the_most_confident_mask_first(loaded):
    (design,) = generate(["MK<mask>YI<mask>A"], loaded, temperature=0)
    ids = loaded.vocabulary.encode("MK<mask>YI<mask>A")
    standard = [loaded.vocabulary.ids[residue] for residue in STANDARD]
    for _ in range(2):
        rows = loaded.blended_log_probabilities([ids])[0][:, standard]
        free = np.flatnonzero(ids == loaded.tokenizer.mask_token_id)
        place = max(free, key=lambda i: rows[i].max())
        ids[place] = standard[rows[place].argmax()]
    assert design.sequence == "".join(loaded.tokenizer.convert_ids_to_tokens(ids.tolist()))


def test_designs_do_not_depend_on_other_proteins(loaded):
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
    with pytest.raises(ValueError, match="Give a FASTA with `<mask>` or `--length N`, not both"):
        generate([UBIQUITIN], folder, length=12)
    report = generate([("short", "MKT"), ("u", UBIQUITIN)], folder, tmp_path / "e.fasta", fixed="76")
    assert report.left_out == ["record 1: 'short' has 3 residues, so position 76 of the fixed ones does not exist."]


@given(
    st.lists(st.floats(-20, 0), min_size=20, max_size=20),
    st.floats(0.1, 3),
    st.integers(0, 20),
    st.floats(0.01, 1),
    st.integers(0, 2**32),
)
def test_draws_respect_top_k_and_top_p(values, temperature, top_k, top_p, seed):
    row = np.array(values)
    drawn = Sampling(temperature, top_k, top_p).draw(row, np.random.default_rng(seed))
    rank = (row > row[drawn]).sum()
    assert not top_k or rank < top_k
    p = np.exp(row / temperature)
    p /= p.sum()
    assert p[row > row[drawn]].sum() <= top_p + 1e-6 or top_k


def test_draws_follow_the_probabilities():
    row = np.log(np.array([0.6, 0.3, *[0.1 / 18] * 18]))
    random = np.random.default_rng(0)
    drawn = np.bincount([Sampling().draw(row, random) for _ in range(4000)], minlength=20) / 4000
    np.testing.assert_allclose(drawn[:2], [0.6, 0.3], atol=0.03)
    assert Sampling(temperature=0).draw(row, random) == 0
    assert {Sampling(top_p=0.5).draw(row, random) for _ in range(50)} == {0}
    assert {Sampling(top_k=2).draw(row, random) for _ in range(200)} == {0, 1}


@pytest.mark.parametrize("text", ["", "0", "3-1", "a", "1-", "1,,2", "-1"])
def test_parse_positions(text):
    with pytest.raises(ValueError, match="is not a list of positions"):
        parse_positions(text)
    assert parse_positions("1-3, 7").tolist() == [0, 1, 2, 6]
