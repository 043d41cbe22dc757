"""Torch modules around our models, so that tests written for torch can drive them.

An adapter holds an MLX model and a tree of torch modules with the same names, parameters and buffers. Before the MLX
model is used, the adapter writes changed torch tensors to it; afterwards it reads the arrays back. The forward pass,
its gradient, loading, saving, casting and resizing are ours.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from mlx.utils import tree_flatten, tree_unflatten
from transformers.utils import ModelOutput

from mlx_esm_hf.dtypes import name_of
from mlx_esm_hf.modeling_layers import TiedDecoder
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from tests.tiny import as_loaded


def to_torch(x: mx.array) -> torch.Tensor:
    if x.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(x.astype(mx.float32))).to(torch.bfloat16)
    return torch.from_numpy(np.array(x))


def to_mlx(x: torch.Tensor) -> mx.array:
    x = x.detach().contiguous()
    if x.dtype == torch.bfloat16:
        return mx.array(x.float().numpy()).astype(mx.bfloat16)
    return mx.array(x.numpy())


def mapped(value: Any, convert: Callable[[mx.array], Any]) -> Any:
    """Apply `convert` to the arrays in an output."""
    if isinstance(value, mx.array):
        return convert(value)
    if isinstance(value, mx.Dtype):
        return getattr(torch, name_of(value))
    if isinstance(value, mx.Device):
        return torch.device("cpu")
    if isinstance(value, ModelOutput):
        return type(value)(**{name: mapped(x, convert) for name, x in value.items()})
    if type(value) in (tuple, list):
        return type(value)(mapped(x, convert) for x in value)
    return value


class Gradient(torch.autograd.Function):
    """Call an MLX function in a torch graph: `mx.vjp` computes the gradient."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., list[mx.array]], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.run, ctx.inputs = run, [to_mlx(x) for x in tensors]
        return tuple(to_torch(x) for x in run(*ctx.inputs))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, found = mx.vjp(ctx.run, ctx.inputs, [to_mlx(x) for x in gradients])
        return None, *(to_torch(x) for x in found)


class Part(torch.nn.Module):
    """A torch module around a part of an MLX model; named like it, without the prefix."""

    def __init__(self, mlx: Any):
        super().__init__()
        self.mlx = mlx

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.__dict__["mlx"], name)
            if not isinstance(value, (bool, int, float, str)):
                raise
            return value

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (bool, int, float)) and hasattr(self.__dict__.get("mlx"), name) and name != "training":
            setattr(self.mlx, name, value)
        super().__setattr__(name, value)


class CheckpointedPart(Part):
    """A layer whose intermediates can be recomputed for the gradient."""


@functools.cache
def part_class(name: str, base: type[Part]) -> type[Part]:
    return type(name.removeprefix("MLX"), (base,), {})


class OnMlxClass(type):
    """Look up attributes that an adapter class lacks in its MLX class."""

    def __getattr__(cls, name: str) -> Any:
        if name == "mlx_class" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls.mlx_class, name)


class Adapter(torch.nn.Module, metaclass=OnMlxClass):
    """A torch module around an MLX model."""

    mlx_class: ClassVar[type[MLXPreTrainedModel]]
    # What transformers' tests read of its base class.
    _keep_in_fp32_modules: ClassVar[set[str]] = set()
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = set()
    _keys_to_ignore_on_load_missing: ClassVar[None] = None
    _supports_sdpa: ClassVar[bool] = True
    _can_record_outputs: ClassVar[None] = None
    # Whether the random weights of a new model count as loaded, so that all of them are saved.
    loaded: ClassVar[bool] = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__()
        mlx = self.mlx_class(config, *args, **kwargs)
        self._hold(as_loaded(mlx) if self.loaded else mlx)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "mlx_class" in cls.__dict__:

            def forward(self: Adapter, *args: Any, **kwargs: Any) -> Any:
                return self._forward(*args, **kwargs)

            forward.__signature__ = inspect.signature(cls.mlx_class.__call__)  # type: ignore[attr-defined]
            cls.forward = forward  # type: ignore[method-assign]

    @classmethod
    def around(cls, mlx: MLXPreTrainedModel, given: dict[int, torch.nn.Module] | None = None) -> Adapter:
        """Return an adapter of an existing model."""
        adapter = ADAPTERS[type(mlx)].__new__(ADAPTERS[type(mlx)])
        torch.nn.Module.__init__(adapter)
        adapter._hold(mlx, given)
        return adapter

    def __deepcopy__(self, memo: Any) -> Adapter:
        self._push()
        copied = self.around(copy.deepcopy(self.mlx))
        copied.explicit_attention = self.explicit_attention
        return copied

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return False  # both ways to compute attention are in use at any time

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return False  # there are no experts

    # The tree of torch modules

    def _hold(self, mlx: MLXPreTrainedModel, given: dict[int, torch.nn.Module] | None = None) -> None:
        """Build the torch modules around a model; `given` are modules to use, by the id of their MLX module."""
        self.__dict__["mlx"] = mlx
        self.__dict__.setdefault("explicit_attention", False)
        self.__dict__["_nodes"] = {}
        for children in (self._modules, self._parameters, self._buffers):
            children.clear()
        self.training = mlx.training
        trainable = {name for name, _ in tree_flatten(mlx.trainable_parameters())}
        buffers = {name for name, _ in mlx.named_buffers()}
        self._fill(self, mlx, "", trainable, buffers, given or {})

    def _fill(self, node: Any, mlx: Any, path: str, trainable: set[str], buffers: set[str], given: Any) -> None:
        items = enumerate(mlx) if isinstance(mlx, list) else list(mlx.items())
        tied = [(k, v) for k, v in vars(mlx).items() if isinstance(v, TiedDecoder)] if not isinstance(mlx, list) else []
        for key, value in [*items, *tied]:
            name, full = str(key), f"{path}{key}"
            if name.startswith("_"):
                continue
            if isinstance(value, mx.array):
                tensor = to_torch(value)
                if full in buffers or not tensor.is_floating_point():
                    node._buffers[name] = tensor
                else:
                    node._parameters[name] = torch.nn.Parameter(tensor, full in trainable)
                continue
            if isinstance(value, MLXPreTrainedModel):
                child: Any = self.around(value, given)
                self._nodes.update(child._nodes)
            elif id(value) in given:
                child = given[id(value)]
            elif isinstance(value, TiedDecoder):
                child = torch.nn.Linear(*reversed(value.weight.shape), bias=False)
                child.weight = self.get_input_embeddings().weight
            elif isinstance(value, nn.Embedding):
                child = torch.nn.Embedding(*value.weight.shape)
                self._fill(child, value, f"{full}.", trainable, buffers, given)
            elif isinstance(value, nn.Linear):
                child = torch.nn.Linear(*reversed(value.weight.shape), bias="bias" in value)
                self._fill(child, value, f"{full}.", trainable, buffers, given)
            elif isinstance(value, nn.Module):
                base = CheckpointedPart if type(value).__name__.endswith("Layer") else Part
                child = part_class(type(value).__name__, base)(value)
                self._fill(child, value, f"{full}.", trainable, buffers, given)
            elif isinstance(value, list) and value and isinstance(value[0], nn.Module):
                child = torch.nn.ModuleList(torch.nn.Identity() for _ in value)
                self._fill(child, value, f"{full}.", trainable, buffers, given)
            else:
                continue
            self._nodes[id(value)] = child
            node._modules[name] = child

    def _tensors(self) -> dict[str, torch.Tensor]:
        named = dict(self.named_parameters(remove_duplicate=False))
        return {**named, **dict(self.named_buffers(remove_duplicate=False))}

    def _push(self) -> None:
        """Write torch tensors that were changed to the MLX model."""
        held, changed = dict(tree_flatten(self.mlx.parameters())), []
        for name, tensor in self._tensors().items():
            if name not in held:  # tied
                continue
            stored = to_torch(held[name])
            if stored.dtype != tensor.dtype or not torch.equal(stored, tensor.detach()):
                changed.append((name, to_mlx(tensor)))
        self.mlx.update(tree_unflatten(changed))

    def _pull(self) -> None:
        """Read all arrays of the MLX model."""
        held, tensors = dict(tree_flatten(self.mlx.parameters())), self._tensors()
        for name, array in held.items():
            tensors[name].data = to_torch(array)
        for node in self.modules():  # torch's layers know their sizes
            if isinstance(node, torch.nn.Embedding):
                node.num_embeddings = node.weight.shape[0]
            elif isinstance(node, torch.nn.Linear):
                node.out_features = node.weight.shape[0]

    # Calls

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self._push()
        attentions_wanted = kwargs.get("output_attentions", self.config.output_attentions)
        if self.explicit_attention and not attentions_wanted:
            kwargs["output_attentions"] = True  # computes the probabilities instead of calling the fused operation
        parameters = {n: p for n, p in self.named_parameters() if p.requires_grad} if torch.is_grad_enabled() else {}
        inputs = {n: x for n, x in kwargs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
        fixed = {name: x for name, x in kwargs.items() if name not in inputs}
        if not parameters and not inputs:
            output = mapped(self.mlx(*args, **fixed), to_torch)
        else:
            output = self._forward_in_graph(args, fixed, parameters, inputs)
        if self.explicit_attention and not attentions_wanted and isinstance(output, ModelOutput):
            output.attentions = None
        return output

    def _forward_in_graph(self, args: Any, fixed: Any, parameters: Any, inputs: Any) -> Any:
        held = dict(tree_flatten(self.mlx.parameters()))
        seed = int(mx.random.randint(0, 1 << 30).item())  # the backward pass repeats the dropout
        structure: Any = None

        def run(*arrays: mx.array) -> list[mx.array]:
            nonlocal structure
            mx.random.seed(seed)
            given = dict(zip([*parameters, *inputs], arrays, strict=True))
            self.mlx.update(tree_unflatten([(name, given[name]) for name in parameters]))
            structure = self.mlx(*args, **fixed, **{name: given[name] for name in inputs})
            self.mlx.update(tree_unflatten([(name, held[name]) for name in parameters]))
            found: list[mx.array] = []
            mapped(structure, found.append)
            return [x for x in found if mx.issubdtype(x.dtype, mx.floating)]

        results = iter(Gradient.apply(run, *parameters.values(), *inputs.values()))
        return mapped(structure, lambda x: next(results) if mx.issubdtype(x.dtype, mx.floating) else to_torch(x))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "mlx" not in self.__dict__:
                raise
        value = getattr(self.mlx, name)
        if not inspect.ismethod(value):
            return mapped(value, to_torch)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._push()
            result = value(*args, **kwargs)
            self._pull()
            return self if result is self.mlx else self._nodes.get(id(result), mapped(result, to_torch))

        return call

    # Names that both torch's modules and our models have

    @property
    def base_model(self) -> Any:
        return self if self.mlx.base_model is self.mlx else self._nodes[id(self.mlx.base_model)]

    @property
    def dtype(self) -> torch.dtype:
        return mapped(self.mlx.dtype, to_torch)

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        return self.mlx.tied_weights() if self.mlx.is_tied() else {}

    def _own(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self._push()
        getattr(self.mlx, name)(*args, **kwargs)
        self._pull()
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self._own("to", *args, **kwargs)

    def float(self) -> Any:
        return self._own("float")

    def half(self) -> Any:
        return self._own("half")

    def bfloat16(self) -> Any:
        return self._own("bfloat16")

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.mlx.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return torch's tensors under the keys of our `state_dict`."""
        tensors = self._tensors()
        return {name: tensors[name].detach() for name in self.mlx.state_dict()}

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:  # type: ignore[override]
        self._push()
        keys = self.mlx.load_state_dict(state_dict, strict)
        self._pull()
        return keys

    def named_children(self) -> Iterator[tuple[str, Any]]:
        yield from super().named_children()

    def get_input_embeddings(self) -> Any:
        return self._nodes[id(self.mlx.get_input_embeddings())]

    def get_output_embeddings(self) -> Any:
        decoder = self.mlx.get_output_embeddings()
        return None if decoder is None else self._nodes[id(decoder)]

    def set_input_embeddings(self, value: torch.nn.Embedding) -> None:
        self._push()
        table = nn.Embedding(*value.weight.shape)
        table.weight = to_mlx(value.weight)
        self.mlx.set_input_embeddings(table)
        self._hold(self.mlx, {id(table): value})

    def set_attn_implementation(self, name: str) -> None:
        """Make "eager" compute attention probabilities explicitly, as `output_attentions=True` does."""
        self.explicit_attention = name == "eager"

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls.around(cls.mlx_class._from_config(config, **kwargs))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = cls.mlx_class.from_pretrained(*args, **kwargs)
        if isinstance(loaded, tuple):
            return cls.around(loaded[0]), loaded[1]
        model = cls.around(loaded)
        model.explicit_attention = kwargs.get("attn_implementation") == "eager"
        return model


ADAPTERS: dict[type, type[Adapter]] = {}


def adapter_of(mlx_class: type[MLXPreTrainedModel]) -> type[Adapter]:
    """Return the adapter class of a model class, with the name of transformers' class."""
    if mlx_class not in ADAPTERS:
        name = mlx_class.__name__.removeprefix("MLX")
        ADAPTERS[mlx_class] = OnMlxClass(name, (Adapter,), {"mlx_class": mlx_class, "__module__": __name__})
    return ADAPTERS[mlx_class]
