from hypothesis import given
from hypothesis import strategies as st

from mlx_esm_hf.data.batches import batches


@given(st.lists(st.integers(1, 50)), st.integers(1, 200))
def test_every_sequence_once_within_the_budget(lengths, budget):
    found = list(batches(lengths, budget))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or longest * len(batch) <= budget
    order = [lengths[i] for batch in found for i in batch]
    assert order == sorted(order, reverse=True)


def test_budget_is_used():
    assert [len(batch) for batch in batches([10] * 7, 30)] == [3, 3, 1]
