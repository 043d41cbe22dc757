"""Meta's ESM protein language models on MLX, behind the interface of Hugging Face transformers.

`__init__.pyi` lists the public names. Each is imported on first use: transformers, which most of them need, takes
seconds to import where torch is installed.
"""

import logging

import lazy_loader

try:
    import mlx.core  # noqa: F401
except ImportError as error:
    raise ImportError(
        "MLX has no backend to compute with. Install one: pip install 'mlx-esm-hf[cpu]' for a CPU on Linux, "
        "'mlx-esm-hf[cuda12]' or 'mlx-esm-hf[cuda13]' for an NVIDIA GPU (only one per environment: they "
        f"overwrite each other's library). On a Mac, plain 'mlx-esm-hf' includes it. ({error})"
    ) from error

from mlx_esm_hf import runtime

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

runtime.prepare()
# Importing transformers without torch logs that no models are available. Here they are.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
