"""Tiny models of each family, and the inputs that the common tests give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mlx_esm_hf import (
    MLXEsmcConfig,
    MLXEsmcForMaskedLM,
    MLXEsmcForSequenceClassification,
    MLXEsmcForTokenClassification,
    MLXEsmcModel,
    MLXEsmConfig,
    MLXEsmForMaskedLM,
    MLXEsmForProteinFolding,
    MLXEsmForSequenceClassification,
    MLXEsmForTokenClassification,
    MLXEsmModel,
)
from tests.tiny import tiny, tiny_folding

LAYERS = {"num_hidden_layers": 2}  # the common tests refuse more
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ESM_CLASSES = (MLXEsmModel, MLXEsmForMaskedLM, MLXEsmForSequenceClassification, MLXEsmForTokenClassification)
ESMC_CLASSES = (MLXEsmcModel, MLXEsmcForMaskedLM, MLXEsmcForSequenceClassification, MLXEsmcForTokenClassification)


class Family(NamedTuple):
    """A family under test.

    Attributes:
        classes: model classes.
        config_class: class of their config.
        fields: fields of a tiny config.
        ids: smallest and largest token id of the inputs.
        settings: attributes of the test case.
    """

    classes: tuple[Any, ...]
    config_class: Callable[..., Any]
    fields: dict[str, Any]
    ids: tuple[int, int] = (4, 28)
    settings: dict[str, Any] = {}


FAMILIES = {
    "ESM-2": Family(ESM_CLASSES, MLXEsmConfig, tiny("ESM-2", **LAYERS, **NO_DROPOUT)),
    "ESM-1b": Family(ESM_CLASSES, MLXEsmConfig, tiny("ESM-1b", **LAYERS, **NO_DROPOUT)),
    "ESMC": Family(
        ESMC_CLASSES,
        MLXEsmcConfig,
        {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 40, **LAYERS},
    ),
    "folding": Family(
        (MLXEsmForProteinFolding,),
        MLXEsmConfig,
        {**tiny_folding(), **LAYERS},
        ids=(0, 19),
        settings={"has_attentions": False, "test_resize_embeddings": False},
    ),
}


class ModelTester:
    """Make configs and inputs, as transformers' tests of a model do.

    Args:
        family: the family.
    """

    batch_size = 5
    seq_length = 9
    is_training = True
    num_labels = 3

    def __init__(self, family: Family):
        self.family = family
        self.hidden_size = family.fields["hidden_size"]
        self.num_hidden_layers = family.fields["num_hidden_layers"]
        self.num_attention_heads = family.fields["num_attention_heads"]
        self.is_training = not family.fields.get("is_folding_model", False)  # folding has no loss

    def get_config(self) -> Any:
        return self.family.config_class(**self.family.fields)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        shape, (least, most) = (self.batch_size, self.seq_length), self.family.ids
        input_ids = torch.randint(least, most + 1, shape)
        mask = torch.ones(shape, dtype=torch.long)
        mask[1:, -2:] = 0  # padding, on the right
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}
