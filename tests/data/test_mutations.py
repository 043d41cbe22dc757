"""Parsing mutations."""

from hypothesis import given
from hypothesis import strategies as st

from mlx_esm_hf.data.mutations import parse, split, suggest_first_residue
from tests.jobs.models import (
    UBIQUITIN,
)

WILD = UBIQUITIN[:20]


@given(st.text(max_size=40) | st.from_regex(r"[A-Za-z]-?[0-9]{1,12}[A-Za-z](:[A-Z][0-9]+[A-Z])?", fullmatch=True))
def test_any_mutation_is_parsed_or_refused(text):
    try:
        parts = split(text)
        found = parse(text, WILD, 1)
    except ValueError as error:
        assert str(error)
        return
    assert len(found) == len(parts) >= 1
    assert all(WILD[s.position] == s.wild_type for s in found)


@given(st.integers(-50, 2000), st.data())
def test_suggestion_undoes_a_shift(first, data):
    places = data.draw(st.sets(st.integers(0, len(UBIQUITIN) - 1), min_size=15))
    mutants = [f"{UBIQUITIN[place]}{place + first}A" for place in places]
    assert suggest_first_residue(mutants, UBIQUITIN) == first
