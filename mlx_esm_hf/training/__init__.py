"""Training: data sets, `MLXTrainer`, adapters, and the jobs behind `mlx-esm train` and `mlx-esm finetune`."""

import pkgutil

import lazy_loader

# The modules are attributes, imported on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, [module.name for module in pkgutil.iter_modules(__path__)])
