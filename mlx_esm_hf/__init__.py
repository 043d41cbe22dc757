"""Meta's ESM protein language models on MLX, behind the interface of Hugging Face transformers."""

try:
    import mlx.core  # noqa: F401
except ImportError as error:
    raise ImportError(
        "MLX finds no backend to compute with. Install one: pip install 'mlx-esm-hf[cpu]' for a CPU on Linux, "
        "'mlx-esm-hf[cuda12]' or 'mlx-esm-hf[cuda13]' for an NVIDIA GPU (one of them in an environment: they "
        f"overwrite each other's library). On a Mac, plain 'mlx-esm-hf' brings it. ({error})"
    ) from error

from mlx_esm_hf import runtime
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
from mlx_esm_hf.models.esm.tokenization_esm import Esm1Tokenizer, EsmTokenizer
from mlx_esm_hf.version import __version__

__all__ = [
    "__version__",
    "Esm1Tokenizer",
    "EsmTokenizer",
    "MLXAutoModel",
    "MLXAutoModelForMaskedLM",
    "MLXAutoModelForSequenceClassification",
    "MLXAutoModelForTokenClassification",
    "MLXEsm1Config",
    "MLXEsmConfig",
    "MLXEsmForMaskedLM",
    "MLXEsmForSequenceClassification",
    "MLXEsmForTokenClassification",
    "MLXEsmModel",
    "MLXEsmPreTrainedModel",
]

runtime.prepare()
