"""The examples in the docstrings of the models run, here with random weights instead of published checkpoints."""

import doctest

import pytest
from transformers import AutoTokenizer, EsmcTokenizer

from mlx_esm_hf import MLXEsmcConfig, MLXEsmConfig
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.models import auto
from mlx_esm_hf.models.esm import configuration_esm, modeling_esm, tokenization_esm
from mlx_esm_hf.models.esmc import configuration_esmc, modeling_esmc
from mlx_esm_hf.models.esmfold import modeling_esmfold
from tests.tiny import tiny, tiny_folding

ESM2 = MLXEsmConfig(**tiny(hidden_size=320, num_attention_heads=20, num_hidden_layers=1))
ESMC = MLXEsmcConfig(hidden_size=960, num_hidden_layers=1, num_attention_heads=15, intermediate_size=64)
CHECKPOINTS = {
    "facebook/esm2_t6_8M_UR50D": (ESM2, tokenization_esm.esm2_tokenizer),
    "biohub/ESMC-300M": (ESMC, EsmcTokenizer),
    "facebook/esmfold_v1": (MLXEsmConfig(**tiny_folding()), None),
}


@pytest.mark.parametrize(
    "module",
    [
        auto,
        configuration_esm,
        configuration_esmc,
        modeling_esm,
        modeling_esmc,
        modeling_esmfold,
        tokenization_esm,
    ],
    ids=lambda module: module.__name__.rpartition(".")[2],
)
def test_examples(module, monkeypatch):
    monkeypatch.setattr(
        MLXPreTrainedModel,
        "from_pretrained",
        classmethod(lambda cls, source, **options: cls(CHECKPOINTS[source][0]).eval()),
    )
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda source: CHECKPOINTS[source][1]())
    monkeypatch.setattr(auto, "commit_of", lambda source, **hub: "main")
    monkeypatch.setattr(auto, "read_config", lambda source, **hub: {"model_type": CHECKPOINTS[source][0].model_type})
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
