"""Which parameters a training changes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_esm_hf.errors import UserError
from mlx_esm_hf.modeling_layers import module_at
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.quantization.layers import layers, spec_of
from mlx_esm_hf.training.adapters import has_adapters


def refuse_quantized(model: Any) -> None:
    """Raise UserError if a part of a model is trained that has quantized layers, which would silently stay as they are.

    A part is the base model or a head. Adapters are trained next to quantized layers.
    """
    if has_adapters(model):
        return
    for name, part in model.children().items():
        quantized = [path for path, layer in layers(part) if spec_of(layer)] if isinstance(part, nn.Module) else []
        if quantized and tree_flatten(part.trainable_parameters()):
            raise UserError(
                f"{name}.{quantized[0]} is quantized and cannot be trained, so only the other parameters would be. "
                "Train adapters (--train lora) or the head alone (--train head, model.base_model.freeze()), or make a "
                "plain model first: mlx-esm convert --dequantize."
            )


def parts_without_loss(model: nn.Module) -> list[nn.Module]:
    """Return the parts of a model that receive no gradient, such as the contact head."""
    bases = [m for m in model.modules() if isinstance(m, MLXPreTrainedModel) and m.base_model is m]
    return [module_at(base, name.rstrip(".")) for base in bases for name in base.without_loss]


def frozen_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return {name: array} of the parameters that are not trained and that the loss depends on."""
    parts: Any = [tree_flatten(part.parameters()) for part in parts_without_loss(model)]
    ignored = {id(array) for part in parts for _, array in part}
    parameters: Any = tree_flatten(model.parameters())
    trained: Any = tree_flatten(model.trainable_parameters(), destination={})
    return {name: array for name, array in parameters if name not in trained and id(array) not in ignored}
