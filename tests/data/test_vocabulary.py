import random
import warnings

import numpy as np
import pytest
from transformers.models.esm.configuration_esm import get_default_vocab_list

from mlx_esm_hf import (
    Esm1Tokenizer,
    EsmTokenizer,
    MLXAutoModel,
    MLXEsm1Config,
    MLXEsmConfig,
    MLXEsmModel,
    load_protein_model,
    pipeline,
)
from mlx_esm_hf.data.vocabulary import Vocabulary, refuse_other_tokenizer
from tests.jobs.models import write_model
from tests.vocabulary import write_vocabulary


def test_one_id_for_each_position(tmp_path):
    tokenizer = EsmTokenizer(write_vocabulary(tmp_path))
    vocabulary = Vocabulary(tokenizer)
    ids = vocabulary.encode("MK<mask>XXXA")
    assert [*vocabulary.before, *ids, *vocabulary.after] == tokenizer("MK<mask>XXXA")["input_ids"]
    assert vocabulary.decode(ids) == ["M", "K", "<mask>", "X", "X", "X", "A"]
    assert (vocabulary.around, vocabulary.pad, ids[2]) == (2, tokenizer.pad_token_id, vocabulary.mask)
    assert ids.dtype == np.int32


def test_esm1_has_no_tokens_after_the_residues():
    vocabulary = Vocabulary(Esm1Tokenizer())
    assert (vocabulary.before, vocabulary.after) == ([32], [])


def test_special_tokens_with_other_names(tmp_path):
    """<mask> in a sequence is the mask token, whatever its name in the tokenizer."""
    (tmp_path / "vocab.txt").write_text("\n".join("%$*?ACDEFGHIKLMNPQRSTVWY^"))
    special = {"pad_token": "%", "eos_token": "$", "mask_token": "*", "unk_token": "?", "cls_token": "^"}
    vocabulary = Vocabulary(Esm1Tokenizer(tmp_path / "vocab.txt", **special))
    assert vocabulary.encode("MK<mask>A<unk><cls><eos>").tolist() == [14, 12, 2, 4, 3, 24, 1]
    assert (vocabulary.before, vocabulary.after) == ([24], [1])


def test_token_outside_the_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="has 'é', for which toy has no token"):
        Vocabulary(EsmTokenizer(write_vocabulary(tmp_path)), "toy").encode("MKé")


def with_vocabulary(folder, tokens, **options):
    (folder / "vocab.txt").write_text("\n".join(tokens))
    return EsmTokenizer(str(folder / "vocab.txt"), **options)


CONFIG = MLXEsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, eos_token_id=2)
ESM = get_default_vocab_list()
RESIDUES = MLXEsmModel.residues


def swapped(a, b):
    return tuple({a: b, b: a}.get(token, token) for token in ESM)


def test_vocabulary_without_residues(tmp_path):
    tokenizer = with_vocabulary(tmp_path, [token for token in ESM if token not in "AC"])
    with pytest.raises(ValueError, match="The vocabulary of toy lacks the residues A, C. "):
        Vocabulary(tokenizer, "toy")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((*ESM, "J"), "has 34 tokens, the model 33"),
        (swapped("<pad>", "L"), "has <pad> at 4, the config at 1"),
        (swapped("<mask>", "."), "has <mask> at 29, the config at 32"),
        (swapped("<eos>", "A"), "has <eos> at 5, the config at 2"),
        (tuple(random.Random(0).sample(ESM, len(ESM))), "the config at"),
    ],
)
def test_tokenizer_of_another_model(tokens, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        refuse_other_tokenizer(with_vocabulary(tmp_path, tokens), CONFIG, RESIDUES, "toy")


def test_shuffled_residues(tmp_path):
    with pytest.warns(UserWarning, match="The residues of the vocabulary of toy have other ids than in its family"):
        refuse_other_tokenizer(with_vocabulary(tmp_path, swapped("L", "A")), CONFIG, RESIDUES, "toy")


def test_vocab_list_of_the_config(tmp_path):
    order = swapped("L", "A")
    MLXEsm1Config(vocab_size=33, mask_token_id=32, vocab_list=list(order)).save_pretrained(tmp_path)
    config = MLXEsm1Config.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_other_tokenizer(with_vocabulary(tmp_path, order), config, RESIDUES)
    with pytest.raises(ValueError, match="does not match the vocab_list of its config"):
        refuse_other_tokenizer(EsmTokenizer(write_vocabulary(tmp_path)), config, RESIDUES, "toy")


def test_matching_tokenizers_are_accepted(tmp_path):
    """All families, and an embedding table padded to a multiple of eight."""
    tokenizer = EsmTokenizer(write_vocabulary(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_other_tokenizer(tokenizer, CONFIG, RESIDUES)
        refuse_other_tokenizer(tokenizer, MLXEsmConfig(vocab_size=40, pad_token_id=1, mask_token_id=32), RESIDUES)
        refuse_other_tokenizer(Esm1Tokenizer(), MLXEsm1Config(), RESIDUES)


@pytest.mark.parametrize(
    "read", [lambda folder: load_protein_model(MLXAutoModel, folder), lambda folder: pipeline("fill-mask", folder)]
)
def test_loading_checks_the_tokenizer(read, tmp_path):
    folder = write_model(tmp_path)
    read(str(folder))
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    with_vocabulary(tmp_path, swapped("<mask>", ".")).save_pretrained(folder)
    with pytest.raises(ValueError, match="has <mask> at 29, the config at 32"):
        read(str(folder))


def test_failing_tokenizer_is_reported(tmp_path):
    tokenizer = EsmTokenizer(write_vocabulary(tmp_path), model_max_length="long")
    with pytest.raises(ValueError, match="The tokenizer of toy fails .*tokenizer_config.json is damaged"):
        Vocabulary(tokenizer, "toy")
