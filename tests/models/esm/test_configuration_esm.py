"""Configs of ESM, compared with transformers', and of ESM-1."""

import json

import pytest
from transformers import AutoConfig, BertConfig, EsmConfig

from mlx_esm_hf import MLXEsm1Config, MLXEsmConfig, MLXEsmModel
from mlx_esm_hf.models.esm.configuration_esm import ESM1_FIELDS, as_mlx_config
from tests.tiny import SIZE, VOCABULARY

ESM2 = {**VOCABULARY, **SIZE}


@pytest.mark.parametrize(
    "fields",
    [
        {"position_embedding_type": "rotary", "token_dropout": True, "rope_theta": 5000.0},
        {"position_embedding_type": "absolute", "emb_layer_norm_before": True, "max_position_embeddings": 40},
        {"num_labels": 3, "problem_type": "regression", "tie_word_embeddings": False, "dtype": "float16"},
    ],
)
def test_saves_the_same_file_as_transformers(fields, tmp_path):
    """Both classes write the same config.json and read each other's."""
    MLXEsmConfig(**ESM2, **fields).save_pretrained(tmp_path / "ours")
    EsmConfig(**ESM2, **fields).save_pretrained(tmp_path / "theirs")
    ours, theirs = ((tmp_path / name / "config.json").read_text() for name in ("ours", "theirs"))
    assert ours == theirs
    for name in ("ours", "theirs"):
        read = MLXEsmConfig.from_pretrained(tmp_path / name), EsmConfig.from_pretrained(tmp_path / name)
        assert type(read[0]) is MLXEsmConfig and read[0].to_diff_dict() == read[1].to_diff_dict()


# Fields of `facebook/esmfold_v1` except `esm_type` and `chunk_size`; transformers 4 accepts no others.
ESMFOLD = {
    "esm_type": None,
    "fp16_esm": True,
    "use_esm_attn_map": False,
    "esm_ablate_pairwise": False,
    "esm_ablate_sequence": False,
    "esm_input_dropout": 0.0,
    "embed_aa": True,
    "bypass_lm": False,
    "lddt_head_hid_dim": 128,
}
TRUNK = {
    "num_blocks": 48,
    "sequence_state_dim": 1024,
    "pairwise_state_dim": 128,
    "sequence_head_width": 32,
    "pairwise_head_width": 32,
    "position_bins": 32,
    "dropout": 0.0,
    "layer_drop": 0.0,
    "cpu_grad_checkpoint": False,
    "max_recycles": 4,
    "chunk_size": 128,
}
STRUCTURE_MODULE = {
    "sequence_dim": 384,
    "pairwise_dim": 128,
    "ipa_dim": 16,
    "resnet_dim": 128,
    "num_heads_ipa": 12,
    "num_qk_points": 4,
    "num_v_points": 8,
    "dropout_rate": 0.1,
    "num_blocks": 8,
    "num_transition_layers": 1,
    "num_resnet_blocks": 2,
    "num_angles": 7,
    "trans_scale_factor": 10,
    "epsilon": 1e-8,
    "inf": 1e5,
}


def test_saves_the_settings_of_folding_as_transformers_4_does(tmp_path):
    """It leaves out the generic fields that transformers 5 writes but does not need."""
    config = MLXEsmConfig(**ESM2, is_folding_model=True)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["esmfold_config"]
    assert written == {**ESMFOLD, "trunk": {**TRUNK, "structure_module": STRUCTURE_MODULE}}
    read, plain = (c.from_pretrained(tmp_path).esmfold_config for c in (MLXEsmConfig, EsmConfig))
    assert read.to_dict() == plain.to_dict() == config.esmfold_config.to_dict()


def test_plain_config_is_accepted():
    plain = EsmConfig(**ESM2, num_labels=3)
    twin = as_mlx_config(plain)
    assert type(twin) is MLXEsmConfig and twin.to_diff_dict() == plain.to_diff_dict() and twin.num_labels == 3
    assert as_mlx_config(twin) is twin
    model = MLXEsmModel(EsmConfig(**ESM2))
    assert type(model.config) is MLXEsmConfig


def test_esm1_defaults():
    """The defaults are those of esm1_t34_670M_UR50S."""
    config = MLXEsm1Config()
    assert config.model_type == "esm1" and config.position_embedding_type == "sinusoidal"
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (35, 1280, 34)
    assert [getattr(config, name) for name in ESM1_FIELDS] == [True, True, False, False, True]
    assert [getattr(MLXEsmConfig(**ESM2), name) for name in ESM1_FIELDS] == [False, False, True, True, True]


@pytest.mark.parametrize("field", ESM1_FIELDS)
def test_esm1_saves_its_own_fields(field, tmp_path):
    changed = not getattr(MLXEsm1Config(), field)
    config = MLXEsm1Config(hidden_size=64, **{field: changed})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "esm1"
    for load in (MLXEsmConfig, MLXEsm1Config, AutoConfig):
        read = load.from_pretrained(tmp_path)
        assert type(read) is MLXEsm1Config and getattr(read, field) is changed
        assert read.to_diff_dict() == config.to_diff_dict()


def test_esm_saves_no_fields_unknown_to_transformers():
    saved = MLXEsmConfig(**ESM2).to_dict()
    assert not saved.keys() & set(ESM1_FIELDS) and saved.keys() == EsmConfig(**ESM2).to_dict().keys()


@pytest.mark.parametrize("field", ESM1_FIELDS)
def test_esm1_fields_are_refused_elsewhere(field):
    """Transformers would ignore the field and compute something else from the same config."""
    changed = not getattr(MLXEsmConfig(**ESM2), field)
    with pytest.raises(ValueError, match=f"{field} must not be set for model_type 'esm': .* Use MLXEsm1Config"):
        MLXEsmConfig(**ESM2, **{field: changed})
    MLXEsmConfig(**ESM2, **{field: not changed})


def test_positions():
    with pytest.raises(ValueError, match="position_embedding_type must not be set for model_type 'esm'"):
        MLXEsmConfig(**ESM2, position_embedding_type="sinusoidal")
    for config in (MLXEsmConfig, MLXEsm1Config):
        with pytest.raises(ValueError, match=r"must be one of \('absolute'.* got 'relative_key'"):
            config(**ESM2, position_embedding_type="relative_key")


def test_other_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected model_type 'esm' or 'esm1', got 'bert'"):
        MLXEsmConfig.from_dict(BertConfig().to_dict())
    with pytest.raises(ValueError, match="got 'bert'"):
        as_mlx_config(BertConfig())
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got 'bert'"):
        MLXEsmConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("option", ["is_decoder", "add_cross_attention"])
def test_unsupported_options(option):
    config = EsmConfig(**ESM2)
    setattr(config, option, True)
    with pytest.raises(ValueError, match=f"{option}=True is not supported"):
        MLXEsmModel(config)


@pytest.mark.parametrize("field", ["vocab_size", "pad_token_id"])
def test_required_fields(field):
    with pytest.raises(ValueError, match="must set vocab_size and pad_token_id"):
        MLXEsmModel(MLXEsmConfig(**ESM2 | {field: None}))


def test_token_dropout_needs_the_mask():
    """Without token dropout nothing reads mask_token_id. With it, transformers fails when it is called."""
    MLXEsmModel(MLXEsmConfig(**ESM2 | {"mask_token_id": None}))
    with pytest.raises(ValueError, match="must set mask_token_id if it sets token_dropout=True"):
        MLXEsmModel(MLXEsmConfig(**ESM2 | {"mask_token_id": None}, token_dropout=True))


def test_hidden_size_is_a_multiple_of_the_heads():
    with pytest.raises(ValueError, match=r"hidden_size \(32\) must be a multiple .* \(5\)"):
        MLXEsmModel(MLXEsmConfig(**ESM2 | {"num_attention_heads": 5}))
