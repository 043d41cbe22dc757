"""The jobs people run ESM for, one module each. Each has a function of the same name and a command of `mlx-esm`."""

import pkgutil

import lazy_loader

# The modules are attributes, imported on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, [module.name for module in pkgutil.iter_modules(__path__)])
