import numpy as np
import pytest

from mlx_esm_hf import EsmTokenizer
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.objective import corrupt


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(esm2_tokenizer())


def test_shares(vocabulary):
    ids = vocabulary.encode("ACDEFGHIKLMNPQRSTVWY" * 20_000)
    inputs, labels = corrupt(ids, vocabulary, np.random.default_rng(0))
    selected = labels != -100
    n = selected.sum()
    masked = (inputs == vocabulary.mask)[selected].sum()
    kept = (inputs == ids)[selected].sum()
    # Within five standard deviations of a binomial count. One replacement in twenty is the residue itself.
    for found, trials, share in ((n, len(ids), 0.15), (masked, n, 0.8), (kept, n, 0.1 + 0.1 / 20)):
        assert abs(found - trials * share) < 5 * np.sqrt(trials * share * (1 - share))
    assert np.array_equal(labels[selected], ids[selected])
    assert np.array_equal(inputs[~selected], ids[~selected])
    replaced = inputs[selected & (inputs != vocabulary.mask) & (inputs != ids)]
    assert set(replaced) == set(vocabulary.encode("ACDEFGHIKLMNPQRSTVWY"))


def test_special_tokens_gaps_and_x_are_left_alone(vocabulary):
    ids = vocabulary.encode("X-.<mask><cls><eos><unk>" * 2000)
    inputs, labels = corrupt(ids, vocabulary, np.random.default_rng(0))
    assert np.array_equal(inputs, ids)
    assert (labels == -100).all()


def test_the_tokenizer_of_a_new_model_is_the_published_one(tmp_path):
    esm2_tokenizer().save_pretrained(tmp_path)
    loaded = EsmTokenizer.from_pretrained(tmp_path)
    assert loaded("MKT<mask>AXBUZO.-")["input_ids"] == [0, 20, 15, 11, 32, 5, 24, 25, 26, 27, 28, 29, 30, 2]
    assert (loaded.pad_token_id, loaded.unk_token_id, len(loaded)) == (1, 3, 33)
