"""Alphabets found from vocabularies, with the tokenizers of transformers as the reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import EsmTokenizer

from mlx_esm_hf.data.alphabets import Nucleotides, Pairs, Proteins, StructureLetters, alphabet_of
from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.vocabulary import Vocabulary
from tests.wild import DNA, DNA_TOKENIZER, PROTEIN, SAPROT, STRUCTURE_LETTERS


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{name: tokenizer} with the vocabularies of published models."""
    made = {}
    for name, words, options in (
        ("DNA", DNA, DNA_TOKENIZER),
        ("pairs", SAPROT, {}),
        ("structure", STRUCTURE_LETTERS, {}),
        ("protein", PROTEIN, {}),
    ):
        file = tmp_path_factory.mktemp(name) / "vocab.txt"
        file.write_text("\n".join(words))
        made[name] = EsmTokenizer(str(file), **options)
    return made


def test_alphabets_are_found_from_the_vocabulary(tokenizers):
    kinds = {name: type(Vocabulary(tokenizer).alphabet) for name, tokenizer in tokenizers.items()}
    assert kinds == {"DNA": Nucleotides, "pairs": Pairs, "structure": StructureLetters, "protein": Proteins}
    with pytest.raises(ValueError, match=r"vocabulary of me/words lacks the residues A, C.*neither k-mers of DNA"):
        alphabet_of({"the": 0, "cat": 1}, "me/words")


def test_dna_is_divided_as_by_the_tokenizer(tokenizers):
    tokenizer, vocabulary = tokenizers["DNA"], Vocabulary(tokenizers["DNA"])

    @given(st.text("ACGTN", min_size=1, max_size=60))
    def hold(sequence):
        ids = [*vocabulary.before, *vocabulary.encode(sequence), *vocabulary.after]
        assert ids == tokenizer(sequence)["input_ids"]

    hold()
    assert vocabulary.before == [3] and vocabulary.after == []


def test_dna_is_cleaned():
    alphabet, report = Nucleotides(6), Report()
    assert alphabet.clean("acguRY-n <mask>T", report=report) == "ACGTNNN<mask>T"
    assert (report.replaced, report.gaps) == (2, 1)
    for sequence, message in (
        ("", "is empty"),
        ("AC5", "'5' at position 3"),
        ("A<cat>", "unknown token <cat>"),
        ("AEC", "'E' at position 2"),
    ):
        with pytest.raises(ValueError, match=message):
            alphabet.clean(sequence)


@pytest.mark.parametrize(
    "sequence, cleaned",
    [
        ("MdEvVp", "MdEvVp"),
        ("MEV", "M#E#V#"),
        ("mev", "M#E#V#"),
        ("M#Ev#p", "M#Ev#p"),
        ("MXV", "M###V#"),
        ("Md<mask>Vp", "Md<mask>Vp"),
        ("Xd", "#d"),
        ("ME<mask>V", "M#E#<mask>V#"),
    ],
)
def test_pairs(tokenizers, sequence, cleaned):
    alphabet = Pairs()
    assert alphabet.clean(sequence) == cleaned
    ids = Vocabulary(tokenizers["pairs"]).encode(cleaned)
    expected = tokenizers["pairs"](cleaned)["input_ids"]
    assert [0, *ids, 2] == expected


def test_what_is_not_a_pair():
    with pytest.raises(ValueError, match="has a chain break"):
        Pairs().clean("MKT|AY")
    for sequence in ("MdE", "M#Ez", "Mdv"):
        with pytest.raises(ValueError, match="which is not a pair of a residue and a structure letter"):
            Pairs().clean(sequence)


def test_structure_letters(tokenizers):
    vocabulary = Vocabulary(tokenizers["structure"])
    assert vocabulary.alphabet.clean("DVP-d") == "dvpd"
    assert [0, *vocabulary.encode("dvpd"), 2] == tokenizers["structure"]("dvpd")["input_ids"]
    with pytest.raises(ValueError, match="'b' at position 2, which is not a structure letter"):
        vocabulary.alphabet.clean("db")


def test_ids_stay_in_the_embedding(tokenizers):
    ids = Vocabulary(tokenizers["DNA"]).encode("ATTCCGATTCCGN<mask>A")
    assert ids.max() < 4105 and ids.dtype == np.int32
