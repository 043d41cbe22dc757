"""Cleaning sequences."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_esm_hf.data.proteins import CHAIN_BREAK, RESIDUES, SPECIAL, Protein, Report, clean, tokens


def test_repr_of_a_protein_is_short():
    assert repr(Protein("a", "MKT", "p.fasta, line 1")) == "Protein(id='a', sequence='MKT', place='p.fasta, line 1')"
    assert len(repr(Protein("a", "MKT" * 999))) < 100


@pytest.mark.parametrize(
    ("sequence", "cleaned", "replaced", "gaps"),
    [
        ("mktayi", "MKTAYI", 0, 0),
        ("MK TA\tYI\n", "MKTAYI", 0, 0),
        ("MKTAYI*", "MKTAYI", 0, 0),
        ("MKJJJV", "MKXXXV", 3, 0),
        ("M-K.T", "MKT", 0, 2),
        ("XBUZO", "XBUZO", 0, 0),
        ("mk<mask>T", "MK<mask>T", 0, 0),
        ("mkt|ayi | j", "MKT|AYI|X", 1, 0),
        ("<mask>|-A", "<mask>|A", 0, 1),
    ],
)
def test_cleaning_rules(sequence, cleaned, replaced, gaps):
    report = Report()
    assert clean(sequence, report=report) == cleaned
    assert (report.replaced, report.gaps) == (replaced, gaps)


def test_aligned_keeps_gaps():
    report = Report()
    assert clean("m-k.T", aligned=True, report=report) == "M-K.T"
    assert report.gaps == 0


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ("", "is empty"),
        ("*", "is empty"),
        ("--", "is empty"),
        ("MK*T", r"stop \(\*\) at position 3"),
        ("MK<pad>T", "unknown token <pad> at position 3"),
        ("MK<masK>T", "unknown token <masK> at position 3; must be one of <mask>"),
        ("MK3T", "'3' at position 3"),
        ("MKéT", "'é' at position 3"),
        ("MKſT", "'ſ' at position 3"),
        ("MKT|", "has an empty chain"),
        ("|MKT", "has an empty chain"),
        ("MKT|--|A", "has an empty chain"),
    ],
)
def test_sequences_that_cannot_be_read(sequence, message):
    with pytest.raises(ValueError, match=message):
        clean(sequence)


@given(st.text(st.sampled_from(RESIDUES + "acj-.*<>| \n1é") | st.characters(), max_size=60))
@example("<mask><mask")
def test_any_text_is_cleaned_or_refused(text):
    try:
        cleaned = clean(text)
    except ValueError as error:
        assert str(error)
        return
    assert cleaned and clean(cleaned) == cleaned
    assert all(token in RESIDUES or token in SPECIAL or token == CHAIN_BREAK for token in tokens(cleaned))
    assert "".join(tokens(cleaned)) == cleaned
    assert all(cleaned.split(CHAIN_BREAK))
