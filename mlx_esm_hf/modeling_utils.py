"""What every model can do besides its forward pass: load, save, push, cast, and answer to what scripts call."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, overload

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils.hub import PushToHubMixin

from mlx_esm_hf import loading
from mlx_esm_hf.checkpoint.names import Dialect, canonical_names, names_in
from mlx_esm_hf.checkpoint.read import load_files
from mlx_esm_hf.checkpoint.resolve import checkpoint_files
from mlx_esm_hf.checkpoint.write import remove_stale_shards, save_safetensors
from mlx_esm_hf.dtypes import as_dtype, cast_error, name_of, resolve_dtype, warn_once
from mlx_esm_hf.errors import CheckpointError, UserError, UserRuntimeError
from mlx_esm_hf.hub.publish import hub_id, publish
from mlx_esm_hf.modeling_inputs import as_array
from mlx_esm_hf.modeling_layers import TiedDecoder
from mlx_esm_hf.ops.kernels import warn_if_missing
from mlx_esm_hf.quantization.layers import (
    declare,
    declared_specs,
    layers,
    quantize_activations,
    replace_layers,
    spec_of,
)
from mlx_esm_hf.runtime.files import replace_files
from mlx_esm_hf.runtime.process import check_process

Model = TypeVar("Model", bound="MLXPreTrainedModel")

# Arguments of transformers' from_pretrained that choose among things MLX has one of.
WITHOUT_MEANING = {"attn_implementation", "device_map", "low_cpu_mem_usage", "trust_remote_code"}


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict` returns, as torch's does."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class MLXPreTrainedModel(nn.Module, PushToHubMixin):
    """Base of the models; mirrors transformers' `PreTrainedModel`.

    A model class says what it is, and loading, saving, casting and resizing read that.

    Class attributes:
        config_class: of its config.
        base_model_prefix: the attribute under which a model with a head holds its base model.
        dialects: the names that its parameters have in checkpoints. `save_pretrained` writes the first one.
        buffers: endings of the names of arrays that follow from the config: a checkpoint may hold them or not, and they
            are neither trained nor rounded to another dtype.
        required: beginnings of the names, in the base model, of parameters that no checkpoint may lack.
        without_loss: beginnings of the names, in the base model, of parameters that no loss reaches, so that training a
            model does not train them.
        quantized: beginnings of the names, in the base model, of layers that `mlx-esm convert --quantize` packs.
        adapted: endings of the names of layers that `finetune` gives an adapter, unless others are named.
        input_embeddings: the embedding table, as an attribute of the base model.
        output_embeddings: the projection to the vocabulary, as an attribute of the model; None, it has none. Where
            `config.tie_word_embeddings` says so, it is the embedding table.
        vocabulary_biases: names of parameters, beside the two before, that have a number for each token.
        residues: their ids in the vocabularies that its checkpoints have; by them a shuffled one is noticed.
    """

    config_class: ClassVar[type[PreTrainedConfig]] = PreTrainedConfig
    base_model_prefix: ClassVar[str] = ""
    dialects: ClassVar[tuple[Dialect, ...]] = (Dialect(()),)
    buffers: ClassVar[tuple[str, ...]] = ()
    required: ClassVar[tuple[str, ...]] = ()
    without_loss: ClassVar[tuple[str, ...]] = ()
    quantized: ClassVar[tuple[str, ...]] = ()
    adapted: ClassVar[tuple[str, ...]] = ()
    input_embeddings: ClassVar[str] = ""
    output_embeddings: ClassVar[str | None] = None
    vocabulary_biases: ClassVar[tuple[str, ...]] = ()
    residues: ClassVar[dict[str, int]] = {}

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        check_process()
        warn_if_missing()
        self.config = config
        # Names of parameters that a checkpoint should have given and did not; see `refuse_untrained`.
        self._newly_initialized: frozenset[str] = frozenset()

    # Loading and saving

    @overload
    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        output_loading_info: Literal[False] = False,
        **kwargs: Any,
    ) -> Model: ...

    @overload
    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        output_loading_info: Literal[True],
        **kwargs: Any,
    ) -> tuple[Model, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        revision: str = "main",
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        subfolder: str = "",
        local_files_only: bool = False,
        force_download: bool = False,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        state_dict: Mapping[str, Any] | None = None,
        quantization_config: None = None,
        activation_dtype: str | None = None,
        lazy: bool = False,
        report: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load config and weights from the Hub, the cache that torch users share, or a folder. Layers that
        `mlx-esm convert` has quantized stay so.

        Args:
            pretrained_model_name_or_path: an id on the Hub, or a folder.
            config: used instead of the checkpoint's: an object, an id or a folder.
            dtype, torch_dtype: a string, an `mx.Dtype` or torch's object. None and "auto" mean the checkpoint's own,
                except on the CPU, where half precision is slower and is loaded as float32, all but the scales of
                quantized layers. What needs no cast is not read into memory, but mapped.
            output_loading_info: return (model, {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}).
            ignore_mismatched_sizes: draw parameters of another shape anew instead of raising.
            state_dict: arrays (MLX, NumPy or torch) to take instead of the checkpoint's.
            quantization_config: None. transformers' kinds of quantization are torch's.
            activation_dtype: "int8" rounds the inputs of quantized linear layers to 8 bits, of 4 or 8 bits in mode
                "affine" (as `mlx-esm convert --activation-dtype` does). `save_pretrained` writes it into the
                config. None follows the checkpoint's config.
            lazy: leave weights in a safetensors file until they are needed, as in mlx-lm.
            report: log the keys that did not fit.
            kwargs: fields of the config to override, and arguments of the class, such as `add_pooling_layer`.
                `attn_implementation`, `device_map`, `low_cpu_mem_usage` and `trust_remote_code` are accepted and
                ignored: MLX has one of each, and no code is ever loaded.

        Returns:
            The model, in evaluation mode.

        Raises:
            OSError: no such repository or file, or no network and nothing in the cache.
            CheckpointError: a damaged or hostile file, or one that lacks a part of the base model.
            RuntimeError: parameters of another shape.
            ValueError: a config of another `model_type` or with values that no model can have, an unknown dtype,
                activation_dtype to be rounded that no layer can round.
            TypeError: a keyword that is neither an argument nor a field of the config.
        """
        if quantization_config is not None:
            raise UserError(
                "quantization_config is not supported: quantize the checkpoint (mlx-esm convert --quantize), or load "
                "the model and quantize it (mlx.nn.quantize)."
            )
        source = str(pretrained_model_name_or_path)
        hub: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        # Asked once, so that config and weights are of one commit, and without a network the cache answers at once.
        hub |= {"revision": loading.commit_of(source, revision=revision, **hub), "force_download": force_download}
        overrides = {k: v for k, v in kwargs.items() if k not in WITHOUT_MEANING}
        config_source = source if config is None else config
        loaded_config, arguments = loading.load_config(cls, config_source, overrides, subfolder=subfolder, **hub)

        if not os.path.isdir(source):
            loaded_config._commit_hash = getattr(hub["revision"], "resolved", None)
        if state_dict is not None:
            arrays = {key: as_array(x) for key, x in state_dict.items()}
        else:
            arrays = load_files(
                checkpoint_files(source, variant=variant, use_safetensors=use_safetensors, subfolder=subfolder, **hub)
            )
        names = canonical_names(arrays, (), cls.base_model_prefix, cls.dialects, {})
        specs = declared_specs(loaded_config, names.values(), cls.base_model_prefix, source)
        if not ignore_mismatched_sizes:
            loading.check_size(cls, loaded_config, names, arrays, specs, source)
        loading.untie_if_different(cls, loaded_config, names, arrays)
        stored = [arrays[key].dtype for key, name in names.items() if cls.is_cast(name, arrays[key])]
        requested = torch_dtype if dtype is None else dtype
        dtype = resolve_dtype(requested, loaded_config.dtype, stored)

        model = cls(loaded_config, **arguments)
        try:
            replace_layers(model, specs, cls.base_model_prefix)
        except ValueError as error:
            raise CheckpointError(f"{source}: the config's `quantization` cannot be ({error})") from error
        if activation_dtype is not None:
            quantize_activations(model, activation_dtype, source)
        matched = loading.assign(
            model,
            arrays,
            dtype,
            source,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            lazy=lazy,
            keep_scales=requested in (None, "auto") and dtype == mx.float32,
        )
        if report:
            loading.report_loading(cls.__name__, source, matched)
        model.eval()
        if not output_loading_info:
            return model
        return model, {
            "missing_keys": matched.missing,
            "unexpected_keys": matched.unexpected,
            "mismatched_keys": matched.mismatched,
            "error_msgs": [],
        }

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        state_dict: Mapping[str, mx.array] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write `config.json` and `model.safetensors`, under the keys of the published repositories, so that
        transformers for torch loads them, unless layers are quantized. Files appear when all of them are whole.

        Args:
            max_shard_size: in bytes, or such as "5GB"; what is larger is written in shards with an index.
            variant: write `model.<variant>.safetensors`.
            safe_serialization: of transformers 4.x. True is all there is: no pickle is ever written.
            push_to_hub: push the folder afterwards; `kwargs` are those of `push_to_hub`.
            state_dict: what to write, by default all of `state_dict()`.

        Raises:
            ValueError: a module says by an attribute `not_saved` why it cannot be written.
        """
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained has no argument {', '.join(map(repr, kwargs))}.")
        if not safe_serialization:
            raise UserError("Only safetensors are written; transformers for torch reads them: leave this argument out.")
        config, state = self.to_save(state_dict)
        with replace_files(save_directory) as folder:
            files = save_safetensors(state, folder, max_shard_size, variant)
            config.save_pretrained(folder)
        remove_stale_shards(save_directory, files, variant)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repo_id, max_shard_size=max_shard_size, **kwargs)

    def to_save(self, state_dict: Mapping[str, mx.array] | None = None) -> tuple[Any, dict[str, mx.array]]:
        """What `save_pretrained` writes of a state dict, by default of `state_dict()`: the config, and {published key:
        array}.

        Raises:
            ValueError: a module says by an attribute `not_saved` why it cannot be written.
        """
        for name, module in self.named_modules():
            if advice := getattr(module, "not_saved", None):
                raise UserError(f"{name} {advice}.")
        config = copy.deepcopy(self.config)
        architecture = type(self).__name__
        if config.model_type in CONFIG_MAPPING_NAMES:  # transformers has this model, too
            architecture = architecture.removeprefix("MLX")
        config.architectures = [architecture]
        config.dtype = name_of(self.dtype)
        declare(config, self)
        state = dict(self.state_dict() if state_dict is None else state_dict)
        tied = [f"{self.output_embeddings}.weight"] if self._is_tied() else []
        for name in [*tied, *self._untrainable()]:  # what is random would look trained when it is loaded again
            state.pop(name, None)
        return config, names_in(self.dialects[0], state, config.num_hidden_layers, self.base_model_prefix)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> Any:
        """Publish model and config on the Hub, in one commit, with a model card if nobody has written one.

        Args:
            max_shard_size: as in `save_pretrained`.
            repo_id, commit_message, commit_description, private, token, revision, create_pr, tags: as in
                `mlx_esm_hf.hub.publish`.

        Returns:
            huggingface_hub's `CommitInfo`, with `commit_url`, `oid` and, of a pull request, `pr_url`.

        Raises:
            OSError: the Hub refused, or did not answer.
            ValueError: `private` for a repository that is public.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size or "50GB")
            publication = publish(
                folder,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                tags=tags,
                base_model=hub_id(self.config._name_or_path),
            )
        return publication.commit

    # Parameters

    def state_dict(self) -> dict[str, mx.array]:
        """{name: array}, a tied output projection included."""
        state = dict(tree_flatten(self.parameters()))
        if self._is_tied():
            state[f"{self.output_embeddings}.weight"] = self.get_output_embeddings().weight
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Assign arrays (MLX, NumPy or torch) under any key dialect that `from_pretrained` reads.

        Raises:
            RuntimeError: another shape, whole numbers for floating ones or the reverse; with `strict`, missing or
                unexpected keys.
        """
        arrays = {key: as_array(x) for key, x in state_dict.items()}
        names, missing, unexpected, mismatched = loading.match(self, arrays)
        held = dict(tree_flatten(self.parameters()))
        errors = [f"shapes differ:\n{loading.shape_lines(mismatched)}"] if mismatched else []
        kinds = {key: cast_error(arrays[key].dtype, held[name].dtype) for key, name in names.items() if name in held}
        errors += [f"{key!r} {wrong}" for key, wrong in kinds.items() if wrong]
        if strict and missing:
            errors.append(f"missing keys: {', '.join(sorted(missing))}")
        if strict and unexpected:
            errors.append(f"unexpected keys: {', '.join(sorted(unexpected))}")
        if errors:
            raise UserRuntimeError(
                f"Error(s) in loading state_dict for {type(self).__name__}:\n  " + "\n  ".join(errors)
            )
        weights = {name: arrays[key].astype(held[name].dtype) for key, name in names.items() if name in held}
        self.update(tree_unflatten(list(weights.items())))
        self.set_newly_initialized(self._newly_initialized - weights.keys())
        return IncompatibleKeys(sorted(missing), sorted(unexpected))

    def named_parameters(self) -> Iterator[tuple[str, mx.array]]:
        """(name, array) of each parameter; buffers are none, and a tied projection is no second one."""
        for name, array in arrays_in(self):
            if not name.endswith(self.buffers):
                yield name, array

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the model has; a quantized layer counts as the layer that it stands for."""
        left_out = set()
        packed = {}  # names of packed weights: how many numbers are in one of theirs
        for path, layer in layers(self):
            if exclude_embeddings and isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding)):
                left_out.add(f"{path}.weight")
            if spec := spec_of(layer):
                packed[f"{path}.weight"] = 32 / spec.bits
                left_out |= {f"{path}.scales", f"{path}.biases"}
        if only_trainable:
            trainable = dict(tree_flatten(self.trainable_parameters()))
            left_out |= {name for name, _ in self.named_parameters() if name not in trainable}
        return sum(
            round(array.size * packed.get(name, 1)) for name, array in self.named_parameters() if name not in left_out
        )

    @property
    def max_tokens(self) -> int | None:
        """Most tokens that a row may have; None where there is no end."""
        return None

    @property
    def base_model(self) -> Any:
        """The model without its head."""
        return getattr(self, self.base_model_prefix) if self.base_model_prefix in self else self

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding table, [vocabulary, D]."""
        return module_at(self.base_model, self.input_embeddings)

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another table in; a tied projection reads it, too."""
        set_module_at(self.base_model, self.input_embeddings, value)
        self.tie_weights()

    def get_output_embeddings(self) -> Any:
        """The projection to the vocabulary, a `Linear` or a `TiedDecoder`; None in a model without one."""
        return None if self.output_embeddings is None else module_at(self, self.output_embeddings)

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """
        Raises:
            ValueError: a model without a projection to the vocabulary.
        """
        if self.output_embeddings is None:
            raise UserError(f"{type(self).__name__} has no output embeddings.")
        set_module_at(self, self.output_embeddings, new_embeddings)

    def tie_weights(self) -> None:
        """Let the output projection read the input embeddings, where the config ties them."""
        if self.output_embeddings is not None and self.config.tie_word_embeddings:
            self.set_output_embeddings(TiedDecoder(self))

    def _is_tied(self) -> bool:
        return isinstance(self.get_output_embeddings(), TiedDecoder)

    @classmethod
    def tied_weights(cls) -> dict[str, str]:
        """{name of the output projection's weight: the embedding's, which it is where they are tied}"""
        if cls.output_embeddings is None:
            return {}
        return {f"{cls.output_embeddings}.weight": f"{cls.base_model_prefix}.{cls.input_embeddings}.weight"}

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Cut the vocabulary, or extend it by tokens that begin as the mean of those there are.

        Returns:
            The embedding table; with no arguments, as it is.

        Raises:
            ValueError: the table, or the output projection, is quantized.
        """
        table, decoder = self.get_input_embeddings(), self.get_output_embeddings()
        if spec_of(table) or (isinstance(decoder, nn.Module) and spec_of(decoder)):
            raise UserError(
                "The vocabulary of quantized embeddings cannot be resized. Resize that of the model that they were "
                "made from, or of what mlx-esm convert --dequantize makes of this one."
            )
        size = new_num_tokens or table.weight.shape[0]
        if pad_to_multiple_of:
            size += -size % pad_to_multiple_of
        table.weight = resized(table.weight, size)
        if decoder is not None and not self._is_tied():
            decoder.weight = resized(decoder.weight, size)
        held = dict(tree_flatten(self.parameters()))
        biases = [(name, resized(held[name], size)) for name in self.vocabulary_biases if name in held]
        self.update(tree_unflatten(biases))
        self.config.vocab_size = self.base_model.config.vocab_size = size
        return table

    # What scripts for torch call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The call itself."""
        return self(*args, **kwargs)

    def requires_grad_(self: Model, requires_grad: bool = True) -> Model:
        """Freeze all parameters, or unfreeze them, as in torch."""
        if requires_grad:
            self.unfreeze()
        else:
            self.freeze()
        return self

    def gradient_checkpointing_enable(self) -> None:
        """From now on, keep of each layer only its input while training, and compute its inside again for the gradient:
        less memory, for a third more time."""
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep what the gradient needs."""
        self._set_gradient_checkpointing(False)

    def _set_gradient_checkpointing(self, value: bool) -> None:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = value

    @classmethod
    def can_generate(cls) -> bool:
        """Whether it writes from left to right: none here does."""
        return False

    # Devices and dtypes

    @property
    def dtype(self) -> mx.Dtype:
        """That of the parameters."""
        return next(array.dtype for _, array in self.named_parameters() if mx.issubdtype(array.dtype, mx.floating))

    @property
    def device(self) -> mx.Device:
        """MLX's default device, where every model computes."""
        return mx.default_device()

    def to(self: Model, *args: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Model:
        """Cast the parameters where an argument is a dtype (a string, `mx.Dtype` or torch's); in place, as in torch.

        A device is accepted and changes nothing: MLX computes on its default device (`mx.set_default_device`).
        """
        for arg in (*args, *([] if dtype is None else [dtype]), *([] if device is None else [device])):
            if (wanted := as_dtype(arg)) is None:
                warn_once(f"MLX computes on its default device, {mx.default_device()}; .to() and its kin move nothing.")
            else:
                self._cast(lambda name: wanted)
        return self

    def _cast(self, dtype_of: Callable[[str], mx.Dtype]) -> None:
        """Cast each parameter to the dtype that its name has."""
        self.update(
            tree_map_with_path(
                lambda name, x: x.astype(dtype_of(name)) if self.is_cast(name, x) else x, self.parameters()
            )
        )

    def loaded_dtype(self, name: str, dtype: mx.Dtype) -> mx.Dtype:
        """The dtype that a parameter has when the model is loaded in `dtype`."""
        return dtype

    @classmethod
    def is_cast(cls, name: str, array: mx.array) -> bool:
        """Whether a change of dtype applies: not to whole numbers, nor to buffers."""
        return mx.issubdtype(array.dtype, mx.floating) and not name.endswith(cls.buffers)

    def float(self: Model) -> Model:
        """Cast the parameters to float32, in place."""
        return self.to(mx.float32)

    def half(self: Model) -> Model:
        """Cast the parameters to float16, in place."""
        return self.to(mx.float16)

    def bfloat16(self: Model) -> Model:
        """Cast the parameters to bfloat16, in place."""
        return self.to(mx.bfloat16)

    def cuda(self: Model, device: Any = None) -> Model:
        """Accepted, and moves nothing; see `to`."""
        return self.to("cuda")

    def cpu(self: Model) -> Model:
        """Accepted, and moves nothing; see `to`."""
        return self.to("cpu")

    def returns_dict(self, return_dict: bool | None) -> bool:
        """Whether a call returns an output with names or a tuple: what it asks for, by default what the config says."""
        return bool(self.config.return_dict if return_dict is None else return_dict)

    # Parameters that no checkpoint gave

    @property
    def newly_initialized(self) -> frozenset[str]:
        """Names of the parameters that the checkpoint lacked."""
        return self._newly_initialized

    def set_newly_initialized(self, names: Iterable[str]) -> None:
        self._newly_initialized = frozenset(names)
        if self.base_model is not self:
            prefix = f"{self.base_model_prefix}."
            self.base_model.set_newly_initialized(n.removeprefix(prefix) for n in names if n.startswith(prefix))

    def refuse_untrained(self, part: str, task: str) -> None:
        """Raise a ValueError where `part` was not in the checkpoint, instead of answering from random weights."""
        if any(name.startswith(f"{part}.") for name in self._newly_initialized):
            raise UserError(
                f"The checkpoint had no {part}: {task} would answer from random weights. Load one that has it, or "
                "train it (.train()) or give it (.load_state_dict()) first."
            )

    def train(self: Model, mode: bool = True) -> Model:
        """Training mode, as in torch; a head that is trained is no longer refused."""
        if mode:
            self.set_newly_initialized(self._untrainable())
        super().train(mode)
        return self

    def _untrainable(self) -> list[str]:
        """Names of the parameters that the checkpoint lacked and that no loss reaches: they mean nothing."""
        prefix, names = f"{self.base_model_prefix}.", self._newly_initialized
        return [name for name in names if name.removeprefix(prefix).startswith(self.without_loss)]


def arrays_in(tree: Any, path: str = "") -> Iterator[tuple[str, mx.array]]:
    """(name, array) of each parameter of a module, named as by `tree_flatten` but found one after the other: who asks
    for the first does not walk through the others."""
    for key, value in enumerate(tree) if isinstance(tree, list) else tree.items():
        if str(key).startswith("_"):
            continue
        if isinstance(value, mx.array):
            yield f"{path}{key}", value
        elif isinstance(value, (dict, list)):
            yield from arrays_in(value, f"{path}{key}.")


def resized(x: mx.array, rows: int) -> mx.array:
    """`x` with this many rows, new ones being the mean of the old."""
    new = mx.broadcast_to(x.mean(axis=0), (max(0, rows - len(x)), *x.shape[1:]))
    return mx.concatenate([x[:rows], new])


def module_at(module: nn.Module, path: str) -> Any:
    """The module under a path such as "embeddings.word_embeddings"."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def set_module_at(module: nn.Module, path: str, value: Any) -> None:
    """Put a module under such a path."""
    parent, _, name = path.rpartition(".")
    setattr(module_at(module, parent) if parent else module, name, value)
