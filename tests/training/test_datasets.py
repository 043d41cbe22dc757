import numpy as np
import pytest

from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.datasets import MaskedProteins, pad
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
    """The ids before they were corrupted, where that is known."""
    return np.where(feature["labels"] != -100, feature["labels"], feature["input_ids"])


def test_pieces_are_random_stretches_of_the_protein(store, vocabulary):
    data = MaskedProteins([(store, np.arange(3))], vocabulary, 32)
    assert data.lengths.tolist() == [7, 32, 32]
    starts = set()
    for epoch in range(200):
        data.set_epoch(epoch)
        for number in range(3):
            feature = data[number]
            assert len(feature["input_ids"]) == data.lengths[number]
            assert feature["input_ids"][0] == vocabulary.ids["<cls>"]
            assert feature["input_ids"][-1] == vocabulary.ids["<eos>"]
            assert feature["labels"][0] == feature["labels"][-1] == -100
            piece, whole = original(feature)[1:-1], store[number]
            places = [i for i in range(len(whole) - len(piece) + 1) if np.array_equal(whole[i : i + len(piece)], piece)]
            assert len(places) == 1
            if number == 1:
                starts.add(places[0])
    assert starts == set(range(40 - 30 + 1))


def test_a_piece_depends_on_seed_epoch_and_number_alone(store, vocabulary):
    first, again, other = (MaskedProteins([(store, np.arange(3))], vocabulary, 32, seed) for seed in (0, 0, 1))
    forward = [first[i]["input_ids"].tolist() for i in range(3)]
    assert [again[i]["input_ids"].tolist() for i in (2, 1, 0)][::-1] == forward
    assert [other[i]["input_ids"].tolist() for i in range(3)] != forward
    again.set_epoch(1)
    assert [again[i]["input_ids"].tolist() for i in range(3)] != forward


def test_weights_draw_from_each_file_by_its_share(store, vocabulary):
    parts = [(store, np.array([0] * 10)), (store, np.array([1] * 30))]
    data = MaskedProteins(parts, vocabulary, 32, weights=[3, 1])
    seen = np.zeros(40, int)
    for epoch in range(10):
        order = data.order(0, epoch)
        assert (order < 10).sum() == 30
        assert len(order) == 40
        seen += np.bincount(order, minlength=40)
    # No item of a file is drawn a second time more often than another.
    assert seen[:10].tolist() == [30] * 10
    assert set(seen[10:]) == {3, 4}


def test_pad():
    row = {"input_ids": np.array([0, 5, 2]), "labels": np.array([-100, 7, -100])}
    longer = {"input_ids": np.array([0, 5, 6, 2]), "labels": np.array([-100, -100, 8, -100])}
    batch = pad([row, longer], padding=1)
    assert batch["input_ids"].tolist() == [[0, 5, 2, 1], [0, 5, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 7, -100, -100], [-100, -100, 8, -100]]
