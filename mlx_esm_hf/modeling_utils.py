"""Base class of all models: everything but the forward pass, such as loading, saving, publishing and casting."""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, overload

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils.hub import PushToHubMixin

from mlx_esm_hf import demo, loading
from mlx_esm_hf.checkpoint.names import Dialect, canonical_names, names_in
from mlx_esm_hf.checkpoint.read import load_files
from mlx_esm_hf.checkpoint.resolve import checkpoint_files
from mlx_esm_hf.checkpoint.write import save_safetensors, stale_weights
from mlx_esm_hf.checks import check_integer
from mlx_esm_hf.dtypes import as_dtype, cast_error, name_of, resolve_dtype, warn_once
from mlx_esm_hf.errors import CheckpointError, UserError, UserRuntimeError
from mlx_esm_hf.hub.publish import hub_id, publish
from mlx_esm_hf.modeling_inputs import as_array
from mlx_esm_hf.modeling_layers import Linear, Module, TiedDecoder, arrays_in, module_at
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
from mlx_esm_hf.training.adapters.files import base_of, load_adapter

Model = TypeVar("Model", bound="MLXPreTrainedModel")

# Arguments of transformers' from_pretrained that have no effect here.
IGNORED_ARGUMENTS = {
    *("attn_implementation", "device_map", "device_mesh", "low_cpu_mem_usage", "max_memory", "tp_plan", "tp_size"),
    *("offload_folder", "offload_state_dict", "offload_buffers", "trust_remote_code", "weights_only"),
    *("from_flax", "from_tf", "mirror", "proxies", "resume_download"),
}


class IncompatibleKeys(NamedTuple):
    """Result of `load_state_dict`, as in torch."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class MLXPreTrainedModel(Module, PushToHubMixin):
    """Base class of the models; mirrors transformers' `PreTrainedModel`.

    A model class declares its properties in class attributes. Loading, saving, casting and resizing read them. "Name"
    is the name of a parameter in the base model, as in `state_dict()`.

    Class attributes:
        config_class: class of the config.
        main_input_name: first argument of the forward pass, as in transformers.
        supports_gradient_checkpointing: whether intermediates can be recomputed for the gradient, as in transformers.
        base_model_prefix: attribute of a model with a head that holds its base model.
        dialects: key dialects of checkpoints. `save_pretrained` writes the first one.
        buffers: suffixes of names of arrays that follow from the config. A checkpoint may lack them, and they are never
            trained or cast.
        stored_buffers: suffixes of names of other arrays that are never trained or cast.
        required: prefixes of names of parameters that every checkpoint must have.
        without_loss: prefixes of names of parameters that receive no gradient, so training freezes them.
        quantized: prefixes of names of layers that `mlx-esm convert --quantize` quantizes.
        plain: prefixes of names of layers that cannot be quantized, because operations read their weights.
        adapted: suffixes of names of layers that `finetune` adapts by default.
        input_embeddings: path of the embedding table in the base model.
        output_embeddings: path of the projection to the vocabulary in the model, or None. With
            `config.tie_word_embeddings` it shares the embedding table.
        vocabulary_biases: names of other parameters with one element per token.
        residues: {residue: token id} in published vocabularies; used to detect a reordered `vocab.txt`.
    """

    config_class: ClassVar[type[PreTrainedConfig]] = PreTrainedConfig
    main_input_name: ClassVar[str] = "input_ids"
    supports_gradient_checkpointing: ClassVar[bool] = True
    base_model_prefix: ClassVar[str] = ""
    dialects: ClassVar[tuple[Dialect, ...]] = (Dialect(()),)
    buffers: ClassVar[tuple[str, ...]] = ()
    stored_buffers: ClassVar[tuple[str, ...]] = ()
    required: ClassVar[tuple[str, ...]] = ()
    without_loss: ClassVar[tuple[str, ...]] = ()
    quantized: ClassVar[tuple[str, ...]] = ()
    plain: ClassVar[tuple[str, ...]] = ()
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
        self._compute_padding = False
        # Initial values of parameters that the checkpoint lacked, without those of the base model. None: not loaded.
        self._newly_initialized: dict[str, mx.array] | None = None

    @property
    def name_or_path(self) -> str:
        """The repository or folder that the model was loaded from; "" for a new model."""
        return self.config._name_or_path

    @classmethod
    def _from_config(cls: type[Model], config: PreTrainedConfig, dtype: Any = None, **kwargs: Any) -> Model:
        """Return a new model with random weights, as transformers' method of the same name.

        Args:
            config: its config.
            dtype: dtype of its parameters; None means float32.
            kwargs: arguments of the class, and ignored ones of transformers.
        """
        model = cls(config, **{name: value for name, value in kwargs.items() if name not in IGNORED_ARGUMENTS})
        return model if dtype is None else model.to(dtype)

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
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        activation_dtype: str | None = None,
        lazy: bool = False,
        report: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load config and weights from the Hub, the Hugging Face cache or a folder.

        Layers that `mlx-esm convert` has quantized stay quantized. If the folder or repository holds an adapter and no
        model, the base model that the adapter names is loaded and gets the adapter. Arguments apply to the base model.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            config: a config, Hub id or folder to use instead of the checkpoint's config.
            revision: branch, tag or commit.
            cache_dir: cache folder; None for the default.
            token: access token for the Hub, or whether to use the stored one.
            subfolder: folder in the repository.
            local_files_only: use the cache only.
            force_download: download again even if the files are cached.
            variant: load `model.<variant>.safetensors`.
            use_safetensors: require or refuse safetensors; None prefers them.
            dtype: a string, `mx.Dtype` or torch dtype. None and "auto" mean the checkpoint's dtype, except on the CPU,
                where half precision is slower and weights are loaded as float32 (but not the scales of quantized
                layers). Arrays that need no cast are memory-mapped.
            torch_dtype: used if `dtype` is None.
            output_loading_info: return (model, {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}).
            ignore_mismatched_sizes: initialize parameters of another shape instead of raising.
            state_dict: arrays (MLX, NumPy or torch) to load instead of the checkpoint's.
            quantization_config: must be None, and the next two arguments False. transformers' quantization methods need
                torch.
            load_in_8bit: see `quantization_config`.
            load_in_4bit: see `quantization_config`.
            key_mapping: {regular expression: replacement} to apply to the keys of the checkpoint, in order.
            activation_dtype: "int8" rounds the inputs of linear layers that are quantized to 4 or 8 bits in mode
                "affine", like `mlx-esm convert --activation-dtype`. `save_pretrained` writes it to the config. None
                follows the checkpoint's config.
            lazy: read weights of a safetensors file only when they are needed, as in mlx-lm.
            report: log keys that did not fit.
            kwargs: config fields to override, and arguments of the class, such as `add_pooling_layer`.
                Arguments of transformers that have no effect here, such as `attn_implementation`, `device_map`,
                `low_cpu_mem_usage`, `trust_remote_code` and `weights_only`, are accepted and ignored.

        Returns:
            The model, in evaluation mode.

        Raises:
            OSError: the repository or a file was not found, or the network is down and the cache is empty.
            CheckpointError: a file is damaged or unsafe, or the checkpoint lacks a part of the base model.
            RuntimeError: parameters have another shape.
            ValueError: the config has another `model_type` or invalid values, the dtype is unknown, or no layer can use
                `activation_dtype`.
            TypeError: an unknown keyword argument.
        """
        if quantization_config is not None or load_in_8bit or load_in_4bit:
            raise UserError(
                "Quantization for torch (quantization_config, load_in_8bit, load_in_4bit) is not supported. Quantize "
                "the checkpoint (mlx-esm convert --quantize) or the loaded model (mlx.nn.quantize)."
            )
        source = str(pretrained_model_name_or_path)
        if source == demo.FOLDER:
            warn_once(demo.NOTICE)
        hub: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        # Resolve once, so that config and weights belong to one commit and an offline cache is found at once.
        hub |= {"revision": loading.commit_of(source, revision=revision, **hub), "force_download": force_download}
        adapter: dict[str, Any] | None = None
        base = base_of(source, subfolder=subfolder, **hub) if config is None and state_dict is None else None
        if base is not None:  # load the base model, then the adapter
            adapter = {"folder_or_repo": source, "subfolder": subfolder, **hub}
            source, subfolder = base.source, ""
            hub |= {"revision": base.resolve(hub)}
            if kwargs.keys().isdisjoint(("num_labels", "id2label")):
                kwargs = base.labels | kwargs
        overrides = {k: v for k, v in kwargs.items() if k not in IGNORED_ARGUMENTS}
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
        for pattern, replacement in (key_mapping or {}).items():
            arrays = {re.sub(pattern, replacement, key): x for key, x in arrays.items()}
        arrays = cls.complete_checkpoint(loaded_config, arrays, source, hub)
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
            raise CheckpointError(f"{source}: invalid `quantization` in the config ({error})") from error
        if activation_dtype is not None:
            quantize_activations(model, activation_dtype, source)
        matched = loading.assign(
            model,
            arrays,
            dtype,
            source,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            lazy=lazy,
            keep_scales=(requested is None or requested == "auto") and dtype == mx.float32,
        )
        if adapter is not None:
            load_adapter(model, **adapter, skip_other_heads=True)
        if report:
            # A part without a loss, such as the contact head, refuses when it is used.
            missing = {n for n in matched.missing & model.newly_initialized if not model.is_without_loss(n)}
            loading.report_loading(cls.__name__, source, matched._replace(missing=missing))
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
        """Write `config.json` and `model.safetensors` with the keys of the published repositories.

        transformers for torch can load them, unless layers are quantized. The files appear together, when all of them
        are complete.

        Args:
            save_directory: folder to write to; created if necessary.
            max_shard_size: bytes, or a string such as "5GB". Larger checkpoints are written in shards with an index.
            variant: write `model.<variant>.safetensors`.
            safe_serialization: must be True; pickles are never written.
            push_to_hub: push the model afterwards.
            state_dict: arrays to write; default: `state_dict()`.
            kwargs: arguments of `push_to_hub`.

        Raises:
            ValueError: a module cannot be saved; its attribute `not_saved` gives the reason.
        """
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained has no argument {', '.join(map(repr, kwargs))}.")
        if not safe_serialization:
            raise UserError("safe_serialization must be True: only safetensors files are written.")
        config, state = self.to_save(state_dict)
        with replace_files(save_directory, stale_weights(variant)) as folder:
            save_safetensors(state, folder, max_shard_size, variant)
            config.save_pretrained(folder)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repo_id, max_shard_size=max_shard_size, **kwargs)

    def to_save(self, state_dict: Mapping[str, mx.array] | None = None) -> tuple[Any, dict[str, mx.array]]:
        """Return what `save_pretrained` writes: the config and {published key: array}.

        Args:
            state_dict: arrays to write; default: `state_dict()`.

        Raises:
            ValueError: a module cannot be saved; its attribute `not_saved` gives the reason.
        """
        for name, module in self.named_modules():
            if advice := getattr(module, "not_saved", None):
                raise UserError(f"{name} {advice}.")
        config = copy.deepcopy(self.config)
        architecture = type(self).__name__
        if config.model_type in CONFIG_MAPPING_NAMES:  # transformers has this model
            architecture = architecture.removeprefix("MLX")
        config.architectures = [architecture]
        config.dtype = name_of(self.dtype)
        declare(config, self)
        state = dict(self.state_dict() if state_dict is None else state_dict)
        tied = [f"{self.output_embeddings}.weight"] if self.is_tied() else []
        for name in [*tied, *self._untrained()]:  # saved random weights would look trained when loaded
            state.pop(name, None)
        layers = self.language_config(config).num_hidden_layers
        return config, names_in(self.dialects[0], state, layers, self.base_model_prefix)

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
        """Publish model and config on the Hub in one commit, and generate a model card if there is none.

        Args:
            repo_id: repository, created if necessary.
            commit_message: summary of the commit. This and the arguments below are those of `mlx_esm_hf.hub.publish`.
            commit_description: text of the commit.
            private: create a private repository.
            token: access token, or whether to use the stored one.
            revision: branch.
            create_pr: open a pull request instead of committing to the branch.
            max_shard_size: see `save_pretrained`.
            tags: tags for the generated model card.

        Returns:
            huggingface_hub's `CommitInfo`, with `commit_url`, `oid` and, for a pull request, `pr_url`.

        Raises:
            OSError: the Hub refused the request or did not answer.
            ValueError: `private` is set, but the repository is public.
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
        """Return {name: array}, including a tied output projection."""
        state = dict(tree_flatten(self.parameters()))
        if self.is_tied():
            state[f"{self.output_embeddings}.weight"] = self.get_output_embeddings().weight
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Assign arrays (MLX, NumPy or torch) with keys of any dialect that `from_pretrained` reads.

        Args:
            state_dict: {key: array}.
            strict: raise if keys are missing or unexpected.

        Raises:
            RuntimeError: another shape, integers instead of floating-point values or the reverse; with `strict`,
                missing or unexpected keys.
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
        self.set_newly_initialized(self.newly_initialized - weights.keys())
        return IncompatibleKeys(sorted(missing), sorted(unexpected))

    def load_weights(self: Model, file_or_weights: str | list[tuple[str, mx.array]], strict: bool = True) -> Model:
        """Assign arrays by their names in the model, from a file or a list of (name, array); see `mlx.nn.Module`."""
        weights = mx.load(file_or_weights) if isinstance(file_or_weights, str) else file_or_weights
        weights = dict(weights)  # type: ignore[arg-type]
        super().load_weights(list(weights.items()), strict)
        self.set_newly_initialized(self.newly_initialized - weights.keys())
        return self

    def named_parameters(self) -> Iterator[tuple[str, mx.array]]:
        """Yield (name, array) of each parameter, without buffers. Tied weights occur once, as the embedding table."""
        for name, array in arrays_in(self):
            if not self.is_buffer(name):
                yield name, array

    def named_buffers(self) -> Iterator[tuple[str, mx.array]]:
        """Yield (name, array) of each array that is never trained."""
        for name, array in arrays_in(self):
            if self.is_buffer(name):
                yield name, array

    def update_modules(self, modules: Any, strict: bool = True) -> Any:
        """Replace layers, as in `mlx.nn.Module`; `mlx.nn.quantize` calls this.

        Raises:
            UserError: a quantized layer replaces one whose weights operations read; see `plain`.
        """
        leaves: Any = tree_flatten(modules, is_leaf=nn.Module.is_module)
        stem = self.base_model_prefix if self.base_model is not self else self.input_embeddings.split(".")[0]
        for path, layer in leaves:
            if path.startswith(self.plain) and isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
                raise UserError(
                    f"{path} cannot be quantized: the operations of folding read plain weights. Quantize the language "
                    f"model alone: mlx.nn.quantize(model.{stem})."
                )
        return super().update_modules(modules, strict)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameter elements; a quantized layer counts as before quantization.

        Args:
            only_trainable: skip frozen parameters.
            exclude_embeddings: skip embedding tables.
        """
        left_out = set()
        per_word = {}  # {name of a quantized weight: its elements per 32-bit word}
        for path, layer in layers(self):
            if exclude_embeddings and isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding)):
                left_out.add(f"{path}.weight")
            if spec := spec_of(layer):
                per_word[f"{path}.weight"] = 32 / spec.bits
                left_out |= {f"{path}.scales", f"{path}.biases"}
        if only_trainable:
            trainable = dict(tree_flatten(self.trainable_parameters()))
            left_out |= {name for name, _ in self.named_parameters() if name not in trainable}
        return sum(
            round(array.size * per_word.get(name, 1)) for name, array in self.named_parameters() if name not in left_out
        )

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trainable and of all parameter elements, as PEFT's method of the same name."""
        return self.num_parameters(only_trainable=True), self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trainable, as PEFT's method of the same name."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding table."""
        return self.language_config(self.config).vocab_size

    @property
    def max_tokens(self) -> int | None:
        """Maximum number of tokens in a row; None if unlimited."""
        return self.max_tokens_of(self.config)

    @classmethod
    def max_tokens_of(cls, config: Any) -> int | None:
        """Return the maximum number of tokens in a row of a model with this config; None if unlimited."""
        return None

    @classmethod
    def checked_config(cls, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return a config as this class uses it.

        Raises:
            ValueError: no model of this class can be built from it.
        """
        return config

    @classmethod
    def language_config(cls, config: Any) -> Any:
        """Return the config of the language model in a model with this config."""
        return config

    @classmethod
    def complete_checkpoint(
        cls, config: Any, arrays: dict[str, mx.array], source: str, hub: Mapping[str, Any]
    ) -> dict[str, mx.array]:
        """Return the arrays of a checkpoint, with what it takes from elsewhere; the config may be completed as well.

        Args:
            config: config of the checkpoint.
            arrays: {key: array}.
            source: Hub id or folder.
            hub: arguments of `find_file`.
        """
        return arrays

    @property
    def compute_padding(self) -> bool:
        """Whether outputs at padding are computed, as transformers does. By default they are 0.

        Set it to compare with a script that uses them: `model.compute_padding = True`. A padded batch is slower with
        it on a CPU.
        """
        return self.base_model._compute_padding

    @compute_padding.setter
    def compute_padding(self, value: bool) -> None:
        self.base_model._compute_padding = bool(value)

    @property
    def base_model(self) -> Any:
        """The model without its head."""
        return getattr(self, self.base_model_prefix) if self.base_model_prefix in self else self

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding table, [vocabulary, D]."""
        return module_at(self.base_model, self.input_embeddings)

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding table, also for a tied output projection."""
        set_module_at(self.base_model, self.input_embeddings, value)
        self.tie_weights()

    def get_output_embeddings(self) -> Any:
        """Return the projection to the vocabulary, a `Linear` or `TiedDecoder`; None if the model has none."""
        return None if self.output_embeddings is None else module_at(self, self.output_embeddings)

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the projection to the vocabulary.

        Raises:
            ValueError: the model has no such projection.
        """
        if self.output_embeddings is None:
            raise UserError(f"{type(self).__name__} has no output embeddings.")
        set_module_at(self, self.output_embeddings, new_embeddings)

    def tie_weights(self) -> None:
        """Share the input embeddings with the output projection if the config ties them."""
        if self.output_embeddings is not None and self.config.tie_word_embeddings:
            self.set_output_embeddings(TiedDecoder(self))

    def untie_weights(self) -> None:
        """Give the output projection a frozen weight of its own, equal to the embedding table that it shared."""
        rows, columns = self.get_input_embeddings().weight.shape
        decoder = Linear(columns, rows, bias=False)
        decoder.weight = self.get_input_embeddings().weight
        decoder.freeze()
        decoder.train(self.training)
        self.set_output_embeddings(decoder)
        self.config.tie_word_embeddings = self.base_model.config.tie_word_embeddings = False

    def is_tied(self) -> bool:
        """Return whether the output projection shares the embedding table."""
        return self.output_embeddings is not None and isinstance(self.get_output_embeddings(), TiedDecoder)

    @classmethod
    def tied_weights(cls) -> dict[str, str]:
        """Return {name of the output projection's weight: name of the embedding table it may be tied to}."""
        if cls.output_embeddings is None:
            return {}
        return {f"{cls.output_embeddings}.weight": f"{cls.base_model_prefix}.{cls.input_embeddings}.weight"}

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Shrink the vocabulary, or extend it.

        Args:
            new_num_tokens: size of the vocabulary; None keeps it.
            pad_to_multiple_of: round the size up to a multiple of this.
            mean_resizing: initialize new tokens to the mean of the existing ones; otherwise like a new model, normal
                with `config.initializer_range`. transformers gives the mean too if the vocabulary is smaller than
                `hidden_size`, as in all of Meta's models; otherwise it adds noise of 3e-5 standard deviations.

        Returns:
            The embedding table.

        Raises:
            ValueError: the table or the output projection is quantized, or `pad_to_multiple_of` is not a positive
                integer.
        """
        table, decoder = self.get_input_embeddings(), self.get_output_embeddings()
        if spec_of(table) or (isinstance(decoder, nn.Module) and spec_of(decoder)):
            raise UserError(
                "The vocabulary of quantized embeddings cannot be resized. Resize it before quantization, or "
                "dequantize the model first (mlx-esm convert --dequantize)."
            )
        size = new_num_tokens or table.weight.shape[0]
        if pad_to_multiple_of is not None:
            check_integer("pad_to_multiple_of", pad_to_multiple_of, 1)
            size += -size % pad_to_multiple_of
        scale = None if mean_resizing else self.config.initializer_range
        table.weight = resized(table.weight, size, scale)
        if decoder is not None and not self.is_tied():
            decoder.weight = resized(decoder.weight, size, scale)
        held = dict(tree_flatten(self.parameters()))
        biases = [(name, resized(held[name], size)) for name in self.vocabulary_biases if name in held]
        self.update(tree_unflatten(biases))
        self.config.vocab_size = self.base_model.config.vocab_size = size
        return table

    # Methods of torch modules

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self(*args, **kwargs)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None) -> None:
        """Recompute each layer's intermediates for the gradient: less memory, but a third more time in training.

        Args:
            activation_checkpointing_kwargs: ignored, since they are arguments of torch's function.
        """
        self._set_gradient_checkpointing(True)

    def activation_checkpointing_disable(self) -> None:
        """Store the intermediates that the gradient needs."""
        self._set_gradient_checkpointing(False)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """Call `activation_checkpointing_enable`, as transformers names it since 5.24."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Call `activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    def _set_gradient_checkpointing(self, value: bool) -> None:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = value

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether intermediates are recomputed for the gradient."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The same as `is_activation_checkpointing`."""
        return self.is_activation_checkpointing

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of the parameters, and of the buffers unless `return_buffers` is False."""
        arrays = arrays_in(self) if return_buffers else self.named_parameters()
        return sum(array.nbytes for _, array in arrays)

    def enable_input_require_grads(self) -> None:
        """Do nothing: in torch, gradient checkpointing of a frozen model needs this."""

    def disable_input_require_grads(self) -> None:
        """Do nothing; see `enable_input_require_grads`."""

    def post_init(self) -> None:
        """Do nothing: parameters are initialized when they are created. Subclasses written for transformers call it."""

    @classmethod
    def can_generate(cls) -> bool:
        """Return False: no model here generates text from left to right."""
        return False

    # Devices and dtypes

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the parameters."""
        return next(array.dtype for _, array in self.named_parameters() if mx.issubdtype(array.dtype, mx.floating))

    @property
    def device(self) -> mx.Device:
        """MLX's default device, which all models use."""
        return mx.default_device()

    def to(self: Model, *args: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Model:
        """Cast the parameters in place if an argument is a dtype, as in torch.

        Args:
            args: dtypes (strings, `mx.Dtype` or torch dtypes) and devices.
            dtype: a dtype.
            device: accepted but has no effect: MLX uses its default device (`mx.set_default_device`).
            kwargs: ignored.
        """
        for arg in (*args, *([] if dtype is None else [dtype]), *([] if device is None else [device])):
            if (wanted := as_dtype(arg)) is None:
                warn_once(f"MLX uses its default device, {mx.default_device()}: moving a model has no effect.")
            else:
                self._cast(lambda name: wanted)
        return self

    def _cast(self, dtype_of: Callable[[str], mx.Dtype]) -> None:
        """Cast each parameter to `dtype_of(name)`."""
        self.update(
            tree_map_with_path(
                lambda name, x: x.astype(dtype_of(name)) if self.is_cast(name, x) else x, self.parameters()
            )
        )

    def loaded_dtype(self, name: str, dtype: mx.Dtype) -> mx.Dtype:
        """Return the dtype of a parameter if the model is loaded in `dtype`."""
        return dtype

    @classmethod
    def is_cast(cls, name: str, array: mx.array) -> bool:
        """Return whether casts apply to a parameter: not to integers or buffers."""
        return mx.issubdtype(array.dtype, mx.floating) and not cls.is_buffer(name)

    @classmethod
    def is_buffer(cls, name: str) -> bool:
        """Return whether an array is never trained or cast."""
        return name.endswith((*cls.buffers, *cls.stored_buffers))

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
        """Return the model unchanged; see `to`."""
        return self.to("cuda")

    def cpu(self: Model) -> Model:
        """Return the model unchanged; see `to`."""
        return self.to("cpu")

    def output_or_tuple(self, output: Any, return_dict: bool | None) -> Any:
        """Return `output`, or its tuple if `return_dict` (default: the config's value) is False."""
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    # Parameters that the checkpoint lacked

    @property
    def newly_initialized(self) -> frozenset[str]:
        """Names of the parameters that the checkpoint lacked; in a new model, of those that training cannot reach."""
        initial = self._newly_initialized
        names = set(filter(self.is_without_loss, self._own_parameters()) if initial is None else initial)
        if self.base_model is not self:
            names |= {f"{self.base_model_prefix}.{name}" for name in self.base_model.newly_initialized}
        return frozenset(names)

    def set_newly_initialized(self, names: Iterable[str]) -> None:
        """Set the names of parameters that the checkpoint lacked, here and in the base model."""
        names, prefix = set(names), f"{self.base_model_prefix}."
        self._newly_initialized = {name: array for name, array in self._own_parameters().items() if name in names}
        if self.base_model is not self:
            self.base_model.set_newly_initialized(n.removeprefix(prefix) for n in names if n.startswith(prefix))

    def refuse_untrained(self, part: str, task: str) -> None:
        """Raise ValueError if `part` was not in the checkpoint, instead of returning results of random weights."""
        if any(name.startswith(f"{part}.") for name in self.newly_initialized):
            reason = f"The checkpoint had no {part}"
            if self._newly_initialized is None:
                reason = f"The {part} of a new model is not trained"
            train = "" if self.is_without_loss(f"{part}.") else "train it (.train()) "
            raise UserError(
                f"{reason}, so {task} would use random weights. Load a checkpoint that has it, {train}or assign it "
                "(.load_state_dict()) first."
            )

    def train(self: Model, mode: bool = True) -> Model:
        """Set training mode, as in torch. Heads that the checkpoint lacked can be used afterwards."""
        if mode and self.base_model._newly_initialized is not None:
            self.set_newly_initialized(filter(self.is_without_loss, self.newly_initialized))
        super().train(mode)
        return self

    def _own_parameters(self) -> dict[str, mx.array]:
        """Return {name: array} without the parameters of the base model."""
        prefix = f"{self.base_model_prefix}." if self.base_model is not self else None
        return {name: x for name, x in self.named_parameters() if prefix is None or not name.startswith(prefix)}

    def is_without_loss(self, name: str) -> bool:
        """Return whether a parameter receives no gradient: what the checkpoint lacked stays random."""
        return name.removeprefix(f"{self.base_model_prefix}.").startswith(self.without_loss)

    def _untrained(self) -> list[str]:
        """Return the names of parameters that were neither loaded nor trained.

        A caller's own training loop may leave the model in evaluation mode, but it replaces the arrays that it trains.
        """
        initial = self._newly_initialized or {}
        own = self._own_parameters()
        names = [
            n for n in self.newly_initialized if self.is_without_loss(n) or (n in initial and own.get(n) is initial[n])
        ]
        if self.base_model is not self:
            names += [f"{self.base_model_prefix}.{name}" for name in self.base_model._untrained()]
        return names


def resized(x: mx.array, rows: int, scale: float | None = None) -> mx.array:
    """Return `x` with this many rows; new rows are the mean of the old ones, or normal with this scale."""
    shape = (max(0, rows - len(x)), *x.shape[1:])
    new = mx.broadcast_to(x.mean(axis=0), shape) if scale is None else mx.random.normal(shape, x.dtype, scale=scale)
    return mx.concatenate([x[:rows], new])


def set_module_at(module: nn.Module, path: str, value: Any) -> None:
    """Set the module at a path; see `module_at`."""
    parent, _, name = path.rpartition(".")
    setattr(module_at(module, parent) if parent else module, name, value)
