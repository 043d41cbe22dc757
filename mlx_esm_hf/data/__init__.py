"""Proteins on their way to a model: read, cleaned, encoded as token ids, cut into windows and grouped into batches.

Terms: a *protein* is an id and a sequence. Its *ids* are token ids, one for each position of the sequence. A *window*
is a range of positions that goes through a model at once, the whole protein if the model accepts it. A *batch* is
windows padded to one length for one forward pass. Nothing in this package depends on a model or a family.
"""

import pkgutil

import lazy_loader

# The modules are attributes, imported on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, [module.name for module in pkgutil.iter_modules(__path__)])
