import numpy as np

from mlx_esm_hf.training.order import epoch_of, rows_in_batches, tokens_in_batches


def batches_of(lengths, tokens, seed=0, epoch=0):
    return tokens_in_batches(epoch_of(len(lengths), seed, epoch), lengths, tokens, np.random.default_rng((seed, epoch)))


def test_each_item_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(3, 500, 3000)
    batches = batches_of(lengths, 2048)
    assert sorted(np.concatenate(batches)) == list(range(3000))
    padded = [lengths[batch].max() * len(batch) for batch in batches]
    assert max(padded) <= 2048
    assert lengths.sum() / sum(padded) > 0.9  # of like length
    widths = [lengths[batch].max() for batch in batches]
    assert abs(np.corrcoef(np.arange(len(widths)), widths)[0, 1]) < 0.2  # and in no order


def test_an_epoch_is_always_alike_and_no_two_are():
    lengths = np.arange(3, 203)
    first, again, second, other = (batches_of(lengths, 500, *key) for key in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert [b.tolist() for b in first] == [b.tolist() for b in again]
    assert [b.tolist() for b in first] != [b.tolist() for b in second]
    assert [b.tolist() for b in first] != [b.tolist() for b in other]


def test_an_item_longer_than_the_budget_is_a_batch_of_its_own():
    batches = batches_of(np.array([5, 1000, 6, 7]), 20)
    assert [1] in [batch.tolist() for batch in batches]
    assert sorted(np.concatenate(batches)) == [0, 1, 2, 3]


def test_rows():
    assert [batch.tolist() for batch in rows_in_batches([3, 1, 2, 0, 4], 2)] == [[3, 1], [2, 0], [4]]
