"""Meta's ESM protein language models on MLX, behind the interface of Hugging Face transformers.

`__init__.pyi` lists the public names. Each is imported on first use: transformers, which most of them need, takes
seconds to import where torch is installed.
"""

import logging
from typing import Any

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

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Import a public name or a module of the package on first use."""
    if name in __all__:
        return _public(name)
    # Only on the way to an error, or to a module.
    import difflib
    import importlib.util

    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    known = {public.lower(): public for public in __all__}
    similar = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f" Did you mean {known[similar[0]]!r}?" if similar else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{hint}")


runtime.prepare()
# Importing transformers without torch logs that no models are available. Here they are.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
