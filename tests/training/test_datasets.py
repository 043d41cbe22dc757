"""Crops, masks and batches of training data."""

import numpy as np
import pytest

from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.datasets import (
    MaskedProteins,
    batches_by_rows,
    batches_by_tokens,
    mask_residues,
    pad,
    shuffled_items,
)
from mlx_esm_hf.training.token_store import open_store


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(esm2_tokenizer())


@pytest.fixture(scope="module")
def store(vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    fasta = folder / "a.fasta"
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), length)) for length in (5, 40, 200)]
    fasta.write_text("".join(f">{i}\n{text}\n" for i, text in enumerate(texts)))
    return open_store(fasta, folder / "store", vocabulary, Report())


def original(feature):
    """Return the ids before masking, as far as the labels contain them."""
    return np.where(feature["labels"] != -100, feature["labels"], feature["input_ids"])


def test_crops_are_random_and_contiguous(store, vocabulary):
    data = MaskedProteins([(store, np.arange(3))], vocabulary, 32)
    assert data.lengths.tolist() == [7, 32, 32]
    starts = set()
    for epoch in range(200):
        data.set_epoch(epoch)
        for index in range(3):
            feature = data[index]
            assert len(feature["input_ids"]) == data.lengths[index]
            assert feature["input_ids"][0] == vocabulary.ids["<cls>"]
            assert feature["input_ids"][-1] == vocabulary.ids["<eos>"]
            assert feature["labels"][0] == feature["labels"][-1] == -100
            crop, whole = original(feature)[1:-1], store[index]
            places = [i for i in range(len(whole) - len(crop) + 1) if np.array_equal(whole[i : i + len(crop)], crop)]
            assert len(places) == 1
            if index == 1:
                starts.add(places[0])
    assert starts == set(range(40 - 30 + 1))


def test_a_crop_depends_only_on_seed_epoch_and_index(store, vocabulary):
    first, again, other = (MaskedProteins([(store, np.arange(3))], vocabulary, 32, seed) for seed in (0, 0, 1))
    forward = [first[i]["input_ids"].tolist() for i in range(3)]
    assert [again[i]["input_ids"].tolist() for i in (2, 1, 0)][::-1] == forward
    assert [other[i]["input_ids"].tolist() for i in range(3)] != forward
    again.set_epoch(1)
    assert [again[i]["input_ids"].tolist() for i in range(3)] != forward


def test_weights_set_the_share_of_each_file(store, vocabulary):
    parts = [(store, np.array([0] * 10)), (store, np.array([1] * 30))]
    data = MaskedProteins(parts, vocabulary, 32, weights=[3, 1])
    seen = np.zeros(40, int)
    for epoch in range(10):
        order = data.order(0, epoch)
        assert (order < 10).sum() == 30
        assert len(order) == 40
        seen += np.bincount(order, minlength=40)
    # Within a file, all items are drawn equally often, give or take one.
    assert seen[:10].tolist() == [30] * 10
    assert set(seen[10:]) == {3, 4}


def test_pad():
    row = {"input_ids": np.array([0, 5, 2]), "labels": np.array([-100, 7, -100])}
    longer = {"input_ids": np.array([0, 5, 6, 2]), "labels": np.array([-100, -100, 8, -100])}
    batch = pad([row, longer], padding=1)
    assert batch["input_ids"].tolist() == [[0, 5, 2, 1], [0, 5, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 7, -100, -100], [-100, -100, 8, -100]]


def test_fractions_of_masked_and_replaced_residues(vocabulary):
    ids = vocabulary.encode("ACDEFGHIKLMNPQRSTVWY" * 20_000)
    inputs, labels = mask_residues(ids, vocabulary, np.random.default_rng(0))
    selected = labels != -100
    n = selected.sum()
    masked = (inputs == vocabulary.mask)[selected].sum()
    kept = (inputs == ids)[selected].sum()
    # Tolerance: five standard deviations of a binomial count. One in twenty random residues is the original one.
    for found, trials, share in ((n, len(ids), 0.15), (masked, n, 0.8), (kept, n, 0.1 + 0.1 / 20)):
        assert abs(found - trials * share) < 5 * np.sqrt(trials * share * (1 - share))
    assert np.array_equal(labels[selected], ids[selected])
    assert np.array_equal(inputs[~selected], ids[~selected])
    replaced = inputs[selected & (inputs != vocabulary.mask) & (inputs != ids)]
    assert set(replaced) == set(vocabulary.encode("ACDEFGHIKLMNPQRSTVWY"))


def test_special_tokens_gaps_and_x_are_not_masked(vocabulary):
    ids = vocabulary.encode("X-.<mask><cls><eos><unk>" * 2000)
    inputs, labels = mask_residues(ids, vocabulary, np.random.default_rng(0))
    assert np.array_equal(inputs, ids)
    assert (labels == -100).all()


def batches_of(lengths, tokens, seed=0, epoch=0):
    return batches_by_tokens(
        shuffled_items(len(lengths), seed, epoch), lengths, tokens, np.random.default_rng((seed, epoch))
    )


def test_each_item_is_in_one_batch_within_the_limit():
    lengths = np.random.default_rng(0).integers(3, 500, 3000)
    batches = batches_of(lengths, 2048)
    assert sorted(np.concatenate(batches)) == list(range(3000))
    padded = [lengths[batch].max() * len(batch) for batch in batches]
    assert max(padded) <= 2048
    assert lengths.sum() / sum(padded) > 0.9  # similar lengths
    widths = [lengths[batch].max() for batch in batches]
    assert abs(np.corrcoef(np.arange(len(widths)), widths)[0, 1]) < 0.2  # and shuffled


def test_batches_depend_on_seed_and_epoch():
    lengths = np.arange(3, 203)
    first, again, second, other = (batches_of(lengths, 500, *key) for key in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert [b.tolist() for b in first] == [b.tolist() for b in again]
    assert [b.tolist() for b in first] != [b.tolist() for b in second]
    assert [b.tolist() for b in first] != [b.tolist() for b in other]


def test_an_item_longer_than_the_limit_is_a_batch_of_its_own():
    batches = batches_of(np.array([5, 1000, 6, 7]), 20)
    assert [1] in [batch.tolist() for batch in batches]
    assert sorted(np.concatenate(batches)) == [0, 1, 2, 3]


def test_batches_by_rows():
    assert [batch.tolist() for batch in batches_by_rows([3, 1, 2, 0, 4], 2)] == [[3, 1], [2, 0], [4]]
