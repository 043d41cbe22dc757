"""Meta's ESM protein language models on MLX, behind the interface of Hugging Face transformers.

The public names are imported when they are used: transformers, which most of them need, takes seconds where torch is
installed.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

try:
    import mlx.core  # noqa: F401
except ImportError as error:
    raise ImportError(
        "MLX finds no backend to compute with. Install one: pip install 'mlx-esm-hf[cpu]' for a CPU on Linux, "
        "'mlx-esm-hf[cuda12]' or 'mlx-esm-hf[cuda13]' for an NVIDIA GPU (one of them in an environment: they "
        f"overwrite each other's library). On a Mac, plain 'mlx-esm-hf' brings it. ({error})"
    ) from error

from mlx_esm_hf import runtime
from mlx_esm_hf.version import __version__

if TYPE_CHECKING:
    from mlx_esm_hf.demo import demo_model
    from mlx_esm_hf.models.auto import (
        MLXAutoModel,
        MLXAutoModelForMaskedLM,
        MLXAutoModelForSequenceClassification,
        MLXAutoModelForTokenClassification,
    )
    from mlx_esm_hf.models.esm.configuration_esm import MLXEsm1Config, MLXEsmConfig
    from mlx_esm_hf.models.esm.modeling_esm import (
        MLXEsmForMaskedLM,
        MLXEsmForSequenceClassification,
        MLXEsmForTokenClassification,
        MLXEsmModel,
        MLXEsmPreTrainedModel,
    )
    from mlx_esm_hf.models.esm.modeling_esmfold import MLXEsmForProteinFolding
    from mlx_esm_hf.models.esm.tokenization_esm import Esm1Tokenizer, EsmTokenizer
    from mlx_esm_hf.models.esmc.configuration_esmc import MLXEsmcConfig
    from mlx_esm_hf.models.esmc.modeling_esmc import (
        MLXEsmcForMaskedLM,
        MLXEsmcForSequenceClassification,
        MLXEsmcForTokenClassification,
        MLXEsmcModel,
        MLXEsmcPreTrainedModel,
    )
    from mlx_esm_hf.models.esmc.tokenization_esmc import EsmcTokenizer
    from mlx_esm_hf.pipelines.huggingface import pipeline
    from mlx_esm_hf.training.adapters import LoraConfig, add_adapters, load_adapter, merge_adapters, save_adapter
    from mlx_esm_hf.training.arguments import MLXTrainingArguments
    from mlx_esm_hf.training.trainer import MLXTrainer

__all__ = [
    "__version__",
    "Esm1Tokenizer",
    "EsmTokenizer",
    "EsmcTokenizer",
    "LoraConfig",
    "MLXAutoModel",
    "MLXAutoModelForMaskedLM",
    "MLXAutoModelForSequenceClassification",
    "MLXAutoModelForTokenClassification",
    "MLXEsm1Config",
    "MLXEsmConfig",
    "MLXEsmForMaskedLM",
    "MLXEsmForProteinFolding",
    "MLXEsmForSequenceClassification",
    "MLXEsmForTokenClassification",
    "MLXEsmModel",
    "MLXEsmPreTrainedModel",
    "MLXEsmcConfig",
    "MLXEsmcForMaskedLM",
    "MLXEsmcForSequenceClassification",
    "MLXEsmcForTokenClassification",
    "MLXEsmcModel",
    "MLXEsmcPreTrainedModel",
    "MLXTrainer",
    "MLXTrainingArguments",
    "add_adapters",
    "demo_model",
    "load_adapter",
    "merge_adapters",
    "pipeline",
    "save_adapter",
]

# The module that has each public name.
HOMES = {
    "Esm1Tokenizer": "mlx_esm_hf.models.esm.tokenization_esm",
    "EsmTokenizer": "mlx_esm_hf.models.esm.tokenization_esm",
    "EsmcTokenizer": "mlx_esm_hf.models.esmc.tokenization_esmc",
    "MLXAutoModel": "mlx_esm_hf.models.auto",
    "MLXAutoModelForMaskedLM": "mlx_esm_hf.models.auto",
    "MLXAutoModelForSequenceClassification": "mlx_esm_hf.models.auto",
    "MLXAutoModelForTokenClassification": "mlx_esm_hf.models.auto",
    "MLXEsm1Config": "mlx_esm_hf.models.esm.configuration_esm",
    "MLXEsmConfig": "mlx_esm_hf.models.esm.configuration_esm",
    "MLXEsmForMaskedLM": "mlx_esm_hf.models.esm.modeling_esm",
    "MLXEsmForProteinFolding": "mlx_esm_hf.models.esm.modeling_esmfold",
    "MLXEsmForSequenceClassification": "mlx_esm_hf.models.esm.modeling_esm",
    "MLXEsmForTokenClassification": "mlx_esm_hf.models.esm.modeling_esm",
    "MLXEsmModel": "mlx_esm_hf.models.esm.modeling_esm",
    "MLXEsmPreTrainedModel": "mlx_esm_hf.models.esm.modeling_esm",
    "MLXEsmcConfig": "mlx_esm_hf.models.esmc.configuration_esmc",
    "MLXEsmcForMaskedLM": "mlx_esm_hf.models.esmc.modeling_esmc",
    "MLXEsmcForSequenceClassification": "mlx_esm_hf.models.esmc.modeling_esmc",
    "MLXEsmcForTokenClassification": "mlx_esm_hf.models.esmc.modeling_esmc",
    "MLXEsmcModel": "mlx_esm_hf.models.esmc.modeling_esmc",
    "MLXEsmcPreTrainedModel": "mlx_esm_hf.models.esmc.modeling_esmc",
    "MLXTrainer": "mlx_esm_hf.training.trainer",
    "MLXTrainingArguments": "mlx_esm_hf.training.arguments",
    "LoraConfig": "mlx_esm_hf.training.adapters",
    "demo_model": "mlx_esm_hf.demo",
    "add_adapters": "mlx_esm_hf.training.adapters",
    "load_adapter": "mlx_esm_hf.training.adapters",
    "merge_adapters": "mlx_esm_hf.training.adapters",
    "pipeline": "mlx_esm_hf.pipelines.huggingface",
    "save_adapter": "mlx_esm_hf.training.adapters",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(HOMES[name]), name)
    globals()[name] = value  # the next time this function is not asked
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


runtime.prepare()
# transformers says when it is imported that without torch no models are available. Here they are.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
