import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_esm_hf import EsmTokenizer
from mlx_esm_hf.data.batches import by_length, make_batches
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.data.windows import Window
from tests.vocabulary import write_vocabulary

LENGTHS = st.lists(st.integers(1, 50), max_size=9)


def filled(lengths, budget):
    """Return the fewest groups possible, each filled up to the budget."""
    groups = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def cost(groups, lengths, row_cost):
    return sum(1 + len(group) * row_cost(lengths[group[0]]) for group in groups)


@given(st.lists(st.integers(1, 50)), st.integers(1, 200), st.sampled_from([0, 0.01, 0.25, 4]))
def test_each_sequence_is_in_one_group_within_the_budget(lengths, budget, token):
    found = by_length(lengths, budget, lambda length: token * length)
    assert sorted(i for group in found for i in group) == list(range(len(lengths)))
    for group in found:
        longest = max(lengths[i] for i in group)
        assert len(group) == 1 or longest * len(group) <= budget
    order = [lengths[i] for group in found for i in group]
    assert order == sorted(order, reverse=True)


@given(st.lists(st.integers(1, 50)), st.integers(1, 200))
def test_without_costs_groups_are_full(lengths, budget):
    assert by_length(lengths, budget) == filled(lengths, budget)


@given(LENGTHS, st.integers(1, 200), st.sampled_from([0.015625, 0.125, 1]), st.sampled_from([1, 2]))
def test_groups_have_minimal_cost(lengths, budget, token, power):
    """Compared with all ways to cut the sorted rows into groups."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def row_cost(length):
        return token * length**power

    costs = []
    for begins in itertools.product([False, True], repeat=max(0, len(order) - 1)):
        groups = [order[:1]] if order else []
        for row, begin in zip(order[1:], begins, strict=True):
            groups.append([row]) if begin else groups[-1].append(row)
        if all(len(group) == 1 or len(group) * lengths[group[0]] <= budget for group in groups):
            costs.append(cost(groups, lengths, row_cost))
    assert cost(by_length(lengths, budget, row_cost), lengths, row_cost) == min(costs)


@given(st.lists(st.integers(3, 2000), min_size=20), st.integers(1, 16384))
def test_groups_cost_no_more_than_full_ones(lengths, budget):
    def row_cost(length):
        return length / 1024

    found = by_length(lengths, budget, row_cost)
    assert cost(found, lengths, row_cost) <= cost(filled(lengths, budget), lengths, row_cost)
    assert sum(len(g) * lengths[g[0]] for g in found) <= sum(len(g) * lengths[g[0]] for g in filled(lengths, budget))


def test_short_rows_are_separated_if_padding_costs_more_than_a_launch():
    """Four short proteins and a long one."""
    lengths = [100, 1000, 110, 120, 90]
    assert by_length(lengths, 8192) == [[1, 3, 2, 0, 4]]
    assert by_length(lengths, 8192, lambda length: length / 1024) == [[1], [3, 2, 0, 4]]
    assert by_length(lengths, 8192, lambda length: length / 4096) == [[1, 3, 2, 0, 4]]


@pytest.fixture
def vocabulary(tmp_path):
    return Vocabulary(EsmTokenizer(write_vocabulary(tmp_path)))


def test_rows_match_the_tokenizer(vocabulary, tmp_path):
    sequences = ["MKTAYI", "GG", "AC<mask>EF"]
    ids = [vocabulary.encode(sequence) for sequence in sequences]
    windows = [Window(0, 0, 6), Window(1, 0, 2), Window(2, 1, 5)]
    (batch,) = make_batches(ids, windows, vocabulary, 100)
    rows = EsmTokenizer(write_vocabulary(tmp_path))(["MKTAYI", "C<mask>EF", "GG"], padding=True, return_tensors="np")
    assert batch.windows == [windows[0], windows[2], windows[1]]
    assert batch.first == 1
    np.testing.assert_array_equal(batch.input_ids, rows["input_ids"])
    np.testing.assert_array_equal(batch.attention_mask, rows["attention_mask"])


def test_padding_within_a_sequence_is_refused(vocabulary):
    ids = np.array([vocabulary.pad, vocabulary.ids["A"]], np.int32)
    with pytest.raises(ValueError, match="contains the padding token"):
        list(make_batches([ids], [Window(0, 0, 2)], vocabulary, 100))
