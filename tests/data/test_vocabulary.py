import numpy as np
import pytest

from mlx_esm_hf import Esm1Tokenizer, EsmTokenizer
from mlx_esm_hf.data.vocabulary import Vocabulary
from tests.vocabulary import write_vocabulary


def test_one_id_for_each_position(tmp_path):
    tokenizer = EsmTokenizer(write_vocabulary(tmp_path))
    vocabulary = Vocabulary(tokenizer)
    ids = vocabulary.encode("MK<mask>XXXA")
    assert [*vocabulary.before, *ids, *vocabulary.after] == tokenizer("MK<mask>XXXA")["input_ids"]
    assert vocabulary.decode(ids) == ["M", "K", "<mask>", "X", "X", "X", "A"]
    assert (vocabulary.around, vocabulary.pad, ids[2]) == (2, tokenizer.pad_token_id, vocabulary.mask)
    assert ids.dtype == np.int32


def test_esm1_has_nothing_behind_the_residues():
    vocabulary = Vocabulary(Esm1Tokenizer())
    assert (vocabulary.before, vocabulary.after) == ([32], [])


def test_a_token_that_is_none_of_the_model_s(tmp_path):
    with pytest.raises(ValueError, match="has 'é', which toy has no token for"):
        Vocabulary(EsmTokenizer(write_vocabulary(tmp_path)), "toy").encode("MKé")


def test_a_tokenizer_that_fails_is_said_in_a_sentence(tmp_path):
    tokenizer = EsmTokenizer(write_vocabulary(tmp_path), model_max_length="long")
    with pytest.raises(ValueError, match="The tokenizer of toy fails .*tokenizer_config.json is damaged"):
        Vocabulary(tokenizer, "toy")
