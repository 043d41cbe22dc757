import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_esm_hf import EsmTokenizer
from mlx_esm_hf.data.batches import by_length, make_batches
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.data.windows import Window
from tests.vocabulary import write_vocabulary


@given(st.lists(st.integers(1, 50)), st.integers(1, 200))
def test_every_sequence_once_within_the_budget(lengths, budget):
    found = list(by_length(lengths, budget))
    assert sorted(i for group in found for i in group) == list(range(len(lengths)))
    for group in found:
        longest = max(lengths[i] for i in group)
        assert len(group) == 1 or longest * len(group) <= budget
    order = [lengths[i] for group in found for i in group]
    assert order == sorted(order, reverse=True)


def test_budget_is_used():
    assert [len(group) for group in by_length([10] * 7, 30)] == [3, 3, 1]


@pytest.fixture
def vocabulary(tmp_path):
    return Vocabulary(EsmTokenizer(write_vocabulary(tmp_path)))


def test_rows_are_what_the_tokenizer_makes(vocabulary, tmp_path):
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
    with pytest.raises(ValueError, match="holds the token for padding"):
        list(make_batches([ids], [Window(0, 0, 2)], vocabulary, 100))
