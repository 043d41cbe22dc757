"""Low-rank adapters, LoRA and DoRA, with PEFT's names and files.

    >>> add_adapters(model, LoraConfig(r=8, target_modules=["query", "key", "value"], modules_to_save=["classifier"]))
    >>> ...                              # train: only the adapters and the classifier are trainable
    >>> save_adapter(model, "adapter")   # PEFT's `PeftModel.from_pretrained(base, "adapter")` loads it as well
    >>> merge_adapters(model)            # a model without adapters, as fast as before

Source: LoRA, Hu et al. 2021 (arXiv:2106.09685); DoRA, Liu et al. 2024 (arXiv:2402.09353); PEFT.
"""

from mlx_esm_hf.training.adapters.config import LoraConfig
from mlx_esm_hf.training.adapters.files import load_adapter, save_adapter
from mlx_esm_hf.training.adapters.layer import LoRALinear
from mlx_esm_hf.training.adapters.model import add_adapters, has_adapters, merge_adapters

__all__ = [
    "LoRALinear",
    "LoraConfig",
    "add_adapters",
    "has_adapters",
    "load_adapter",
    "merge_adapters",
    "save_adapter",
]
