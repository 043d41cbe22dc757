"""New models for pretraining."""

from mlx_esm_hf import EsmTokenizer
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer


def test_the_tokenizer_of_a_new_model_equals_the_published_one(tmp_path):
    esm2_tokenizer().save_pretrained(tmp_path)
    loaded = EsmTokenizer.from_pretrained(tmp_path)
    assert loaded("MKT<mask>AXBUZO.-")["input_ids"] == [0, 20, 15, 11, 32, 5, 24, 25, 26, 27, 28, 29, 30, 2]
    assert (loaded.pad_token_id, loaded.unk_token_id, len(loaded)) == (1, 3, 33)
