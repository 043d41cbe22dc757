"""ESM-1's tokenizer compared with fair-esm's alphabet. The other models use transformers' tokenizer."""

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_esm_hf
from mlx_esm_hf import Esm1Tokenizer, MLXEsm1Config
from mlx_esm_hf.models.esm.tokenization_esm import ESM1_VOCABULARY
from tests.tiny import SIZE

esm = pytest.importorskip("esm")

ALPHABET = esm.data.Alphabet.from_architecture("ESM-1")
TOKENIZER = Esm1Tokenizer()
RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO.-"


def test_other_models_use_transformers_tokenizer():
    assert mlx_esm_hf.EsmTokenizer is transformers.EsmTokenizer


def test_vocabulary():
    assert list(ESM1_VOCABULARY) == ALPHABET.all_toks
    assert TOKENIZER.get_vocab() == ALPHABET.tok_to_idx
    assert len(TOKENIZER) == TOKENIZER.vocab_size == len(ALPHABET) == MLXEsm1Config().vocab_size


def test_special_tokens_are_those_of_the_config():
    config = MLXEsm1Config()
    for name, id in (("cls", 32), ("mask", 33), ("pad", 1), ("unk", 3)):
        assert getattr(TOKENIZER, f"{name}_token_id") == id == ALPHABET.get_idx(f"<{name}>")
    assert (config.bos_token_id, config.mask_token_id, config.pad_token_id) == (32, 33, 1)
    assert TOKENIZER.eos_token is None and config.eos_token_id is None and not ALPHABET.append_eos


@settings(max_examples=50)
@given(st.lists(st.lists(st.sampled_from([*RESIDUES, "<mask>"]), min_size=1, max_size=20), min_size=1, max_size=4))
def test_tokens(proteins):
    """A padded batch has the same ids as with fair-esm's batch converter."""
    sequences = ["".join(protein) for protein in proteins]
    _, _, expected = ALPHABET.get_batch_converter()([("", sequence) for sequence in sequences])
    batch = TOKENIZER(sequences, padding=True, return_special_tokens_mask=True)
    assert batch["input_ids"] == expected.tolist()
    assert batch["attention_mask"] == expected.ne(ALPHABET.padding_idx).long().tolist()
    special = {ALPHABET.cls_idx, ALPHABET.padding_idx}
    for ids, mask in zip(batch["input_ids"], batch["special_tokens_mask"], strict=True):
        # A tokenizer also reports <mask> as special in finished ids, which a padded batch has.
        assert mask == [int(id in special) for id in ids]


@pytest.mark.parametrize("sequence", ["", "M", "MKT", "MK<mask>T", "M" * 2000])
def test_special_tokens_mask(sequence):
    """The mask has one entry per token; `EsmTokenizer` without an <eos> returns one more."""
    ids = TOKENIZER(sequence)["input_ids"]
    mask = TOKENIZER.get_special_tokens_mask(ids[1:])
    assert mask == [1] + [0] * (len(ids) - 1)
    already = TOKENIZER.get_special_tokens_mask(ids, already_has_special_tokens=True)
    assert already == [int(id in TOKENIZER.all_special_ids) for id in ids] and already[0] == 1


def test_pairs_have_no_separator():
    with pytest.raises(ValueError, match="tokenize them separately"):
        TOKENIZER.get_special_tokens_mask([5], [6])


@pytest.mark.parametrize("kind", ["mlx", "np"])
def test_arrays(kind):
    batch = TOKENIZER(["MKT", "M"], padding=True, return_tensors=kind)
    assert batch["input_ids"].tolist() == [[32, 20, 15, 11], [32, 20, 1, 1]]
    assert TOKENIZER.decode(batch["input_ids"][0].tolist()) == "<cls> M K T"


def test_save_and_load(tmp_path):
    """The class and AutoTokenizer load it, from the model's config or from the tokenizer's file."""
    TOKENIZER.save_pretrained(tmp_path / "alone")
    TOKENIZER.save_pretrained(tmp_path / "model")
    MLXEsm1Config(**SIZE).save_pretrained(tmp_path / "model")
    for load, folder in (
        (Esm1Tokenizer, "alone"),
        (Esm1Tokenizer, "model"),
        (transformers.AutoTokenizer, "alone"),
        (transformers.AutoTokenizer, "model"),
    ):
        tokenizer = load.from_pretrained(tmp_path / folder)
        assert type(tokenizer) is Esm1Tokenizer
        assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
        assert tokenizer.special_tokens_map == TOKENIZER.special_tokens_map
        assert tokenizer("MK<mask>")["input_ids"] == [32, 20, 15, 33]
        assert tokenizer.get_special_tokens_mask([20, 15]) == [1, 0, 0]


def test_another_vocabulary(tmp_path):
    """A vocabulary with an <eos>, which is appended to the residues and included in the mask."""
    (tmp_path / "vocab.txt").write_text("\n".join(("<cls>", "<pad>", "<eos>", "<unk>", "A", "<mask>")))
    tokenizer = Esm1Tokenizer(tmp_path / "vocab.txt", eos_token="<eos>")
    assert tokenizer("AA")["input_ids"] == [0, 4, 4, 2]
    assert tokenizer.get_special_tokens_mask([4, 4]) == [1, 0, 0, 1]
