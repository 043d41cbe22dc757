"""Configs of ESMC, compared with transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from mlx_esm_hf import MLXEsmcConfig, MLXEsmcModel
from tests.models.esmc.peers import config


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu' .* got 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"head_dim": 16}, r"must be hidden_size \(32\), got 16 times 4"),
        ({"num_attention_heads": 32}, "head_dim must be even for rotary positions, got 1"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type must be 'default', got 'linear'",
        ),
        ({"pad_token_id": 64}, "pad_token_id must be between 0 and 63, got 64"),
        ({"mask_token_id": None}, "must set pad_token_id and mask_token_id"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1 .* got 0"),
    ],
)
def test_bad_configs(settings: dict[str, Any], message: str) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    with pytest.raises(ValueError, match=message):
        MLXEsmcModel(MLXEsmcConfig(**{**size, **settings}))


def test_config_of_another_family(tmp_path: Path) -> None:
    transformers.EsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="MLXEsmcConfig expected model_type 'esmc', got 'esm'"):
        MLXEsmcConfig.from_pretrained(tmp_path)


def test_config_matches_transformers(tmp_path: Path) -> None:
    ours = MLXEsmcConfig(hidden_size=960, num_hidden_layers=30, num_attention_heads=15, intermediate_size=2560)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is transformers.EsmcConfig and theirs.to_diff_dict() == ours.to_diff_dict()
    assert MLXEsmcModel(config("model", num_hidden_layers=1)).config.model_type == "esmc"
