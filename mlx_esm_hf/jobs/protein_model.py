"""A model with its tokenizer, as the jobs use it: token ids go through the network in windows and batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_esm_hf import ops
from mlx_esm_hf.checks import check_choice, check_integer
from mlx_esm_hf.data.batches import Batch, RowCost, make_batches
from mlx_esm_hf.data.tokenizer import load_tokenizer
from mlx_esm_hf.data.vocabulary import Vocabulary, refuse_other_tokenizer, refuse_without_mask
from mlx_esm_hf.data.windows import Window, blend, cut_windows, ramp
from mlx_esm_hf.demo import shown_name
from mlx_esm_hf.dtypes import check_dtype
from mlx_esm_hf.errors import NonFiniteError, UserError
from mlx_esm_hf.quantization.layers import check_activation_dtype, has_int8_activations
from mlx_esm_hf.runs.outputs import earlier_settings
from mlx_esm_hf.runtime import distributed, memory
from mlx_esm_hf.runtime.costs import costs
from mlx_esm_hf.runtime.device import DEVICES, device_name, use_device

if TYPE_CHECKING:  # these imports take seconds, and torch with them: jobs check their arguments first
    from transformers import PreTrainedTokenizerBase

    from mlx_esm_hf.modeling_utils import MLXPreTrainedModel

CHUNK_BATCHES = 16  # batches of a chunk: enough to sort proteins by length

# Arguments of `from_pretrained` that also apply to the tokenizer.
SHARED = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download")
LONG = ("error", "truncate", "window")

# Outputs that a config may request and jobs do not use.
PLAIN = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}


@dataclass
class ProteinModel:
    """A model, its tokenizer and batching.

    Proteins can be encoded and checked before the weights are loaded.

    Args:
        network: the model, or its checkpoint until `load` loads the weights.
        tokenizer: its tokenizer.
        name: where the model is from, for manifests and messages.
        revision: its commit, for manifests.
        long: how to treat a protein that is longer than the position table: "error", "truncate", or "window" to cut it
            into overlapping windows.
        batch_tokens: maximum tokens of a batch, padding included; 0 for what suits the device and its memory.
        options: arguments of `MLXPreTrainedModel.from_pretrained` for loading the weights.
    """

    network: Any
    tokenizer: PreTrainedTokenizerBase
    name: str = ""
    revision: str | None = None
    long: str = "error"
    batch_tokens: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("long", self.long, LONG)
        self.vocabulary = Vocabulary(self.tokenizer, self.name, self.network.config.vocab_size)
        refuse_other_tokenizer(self.tokenizer, self.network.config, self.network.residues, self.name)
        if not self.is_checkpoint:
            self.batch_tokens = self.batch_tokens or memory.batch_tokens(self.network.config.hidden_size)

    @property
    def is_checkpoint(self) -> bool:
        """Whether the weights have not been loaded yet."""
        return hasattr(self.network, "model_class")

    @property
    def model_class(self) -> type[MLXPreTrainedModel]:
        """Class of the model."""
        return self.network.model_class if self.is_checkpoint else type(self.network)

    def load(self) -> None:
        """Load the weights, unless they have been loaded."""
        if not self.is_checkpoint:
            return
        self.network = self.network.load(**self.options)
        for option, value in PLAIN.items():
            setattr(self.network.config, option, value)
        suits = memory.batch_tokens(self.network.config.hidden_size)  # the weights take memory too
        self.batch_tokens = agreed(self.batch_tokens or suits, self.batch_tokens)

    @property
    def longest(self) -> int | None:
        """Maximum positions that the model accepts at once; None for no limit."""
        most: int | None = self.network.max_tokens
        return None if most is None else most - self.vocabulary.around

    @property
    def known_settings(self) -> dict[str, Any]:
        """Those of `settings` that do not depend on the weights."""
        return known_settings_of(self) | {"long": self.long}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that results depend on, for the manifest of a run."""
        return settings_of(self) | {"long": self.long}

    @property
    def chunk_work(self) -> int:
        """Maximum work of a chunk, in tokens."""
        return CHUNK_BATCHES * self.batch_tokens

    def refuse_long(self, length: int) -> None:
        """Refuse a protein that is too long, if `long` is "error".

        Raises:
            UserError: the protein has more positions than the model accepts.
        """
        if self.long == "error" and self.longest is not None and length > self.longest:
            raise UserError(
                f"has {length} residues; {self.name or 'this model'} accepts at most {self.longest}. Use "
                "--long truncate, --long window, or ESM-2, which has no limit"
            )

    def encode(self, sequence: str) -> np.ndarray:
        """Return the ids [positions] of a cleaned sequence, truncated if `long` is "truncate".

        Raises:
            UserError: the vocabulary does not have a token of the sequence.
        """
        ids = self.vocabulary.encode(sequence)
        return ids[: self.longest] if self.long == "truncate" else ids

    def num_residues(self, ids: np.ndarray) -> int:
        """Return the number of residues, without chain breaks."""
        return int(self.vocabulary.residue_mask(ids).sum())

    def window_tokens(self, ids: np.ndarray) -> list[int]:
        """Return the number of tokens of each window of a protein."""
        return [window.length + self.vocabulary.around for window in self.windows(0, len(ids))]

    def windows(self, sequence: int, length: int) -> list[Window]:
        """Cut a protein, given by its index and length, into the windows that the model needs; see `cut_windows`."""
        return cut_windows(sequence, length, self.longest)

    def batches(
        self,
        sequences: Sequence[np.ndarray],
        windows: Sequence[Window] | None = None,
        row_cost: RowCost | None = None,
    ) -> Iterator[Batch]:
        """Yield windows in batches of similar length, not in order.

        Args:
            sequences: ids [positions] of each protein.
            windows: the windows to batch; None for all windows of all proteins.
            row_cost: see `by_length`; None for that of this model.
        """
        if windows is None:
            windows = [window for i, ids in enumerate(sequences) for window in self.windows(i, len(ids))]
        return make_batches(sequences, windows, self.vocabulary, self.batch_tokens, row_cost or self.row_cost())

    def row_cost(self) -> RowCost | None:
        """Return the cost of a row, see `by_length`; None if batches are packed and padding costs nothing."""
        if ops.packs(self.network.dtype):
            return None
        launch = costs().launch_tokens
        return lambda tokens: tokens / launch

    def log_probabilities(
        self, sequences: Sequence[np.ndarray], windows: Sequence[Window] | None = None
    ) -> Iterator[tuple[Window, np.ndarray]]:
        """Yield windows with their log-probabilities [positions, vocabulary], float32, not in order.

        Args:
            sequences: ids [positions] of each protein.
            windows: the windows to compute; None for all windows of all proteins.

        Raises:
            NonFiniteError: a log-probability is infinite or NaN. What is sorted or drawn by it could look right.
        """
        for batch in self.batches(sequences, windows):
            logits = self.network(batch.input_ids, batch.attention_mask).logits.astype(mx.float32)
            rows = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            for window, row in zip(batch.windows, rows, strict=True):
                found = row[batch.first : batch.first + window.length]
                if not np.isfinite(found).all():
                    raise NonFiniteError("A log-probability is NaN or infinite.")
                yield window, found

    def cause(self, ids: np.ndarray) -> str:
        """Return why the results of a protein, given by its ids [positions], are NaN or infinite, and what to do."""
        if damaged := damage(self.network):
            return damaged
        (batch, *_) = self.batches([ids], self.windows(0, len(ids))[:1])
        states = self.network.base_model(batch.input_ids, batch.attention_mask, output_hidden_states=True).hidden_states
        finite = [mx.isfinite(x).all().item() for x in states]
        if all(finite):
            place = "All hidden states of the protein are finite, but not what is computed from them."
        elif finite[0]:
            place = f"The first hidden states that are not finite are those of layer {finite.index(False)}."
        else:
            place = "The embeddings of its tokens are not finite."
        return f"{place} {advice(self.network.dtype)}"

    def blended_log_probabilities(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the log-probabilities of each protein, [positions, vocabulary], float32."""
        parts: list[list[tuple[Window, np.ndarray]]] = [[] for _ in sequences]
        for window, rows in self.log_probabilities(sequences):
            parts[window.sequence].append((window, rows))
        return [blend(windows, len(ids)) for windows, ids in zip(parts, sequences, strict=True)]

    def masked_log_probabilities(self, ids: np.ndarray, positions: Sequence[int]) -> np.ndarray:
        """Return the log-probabilities at positions while only that position is masked.

        If the protein needs several windows, each position is computed in the window where it is farthest from the
        edges.

        Args:
            ids: ids [positions] of a protein.
            positions: the positions to mask, each in a pass of its own.

        Returns:
            Log-probabilities [len(positions), vocabulary], float32.
        """
        windows = self.windows(0, len(ids))
        weights = np.full((len(windows), len(ids)), -1, np.float32)
        for row, window in zip(weights, windows, strict=True):
            row[window.start : window.stop] = ramp(window, len(ids))
        best = weights.argmax(axis=0)
        found = np.empty((len(positions), self.network.config.vocab_size), np.float32)
        at_once = max(1, 16 * self.batch_tokens // len(ids))  # limits the copies of a long protein in memory
        for first in range(0, len(positions), at_once):
            group = positions[first : first + at_once]
            variants = [ids.copy() for _ in group]
            for variant, position in zip(variants, group, strict=True):
                variant[position] = self.vocabulary.masked(ids[position])
            views = [windows[best[position]]._replace(sequence=i) for i, position in enumerate(group)]
            for window, rows in self.log_probabilities(variants, views):
                found[first + window.sequence] = rows[group[window.sequence] - window.start]
        return found


def load_protein_model(
    cls: Any,
    model: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    activation_dtype: str | None = None,
    device: str | None = None,
    long: str = "error",
    batch_tokens: int | None = None,
    output: str | os.PathLike[str] | None = None,
    weights: bool = True,
    **hub: Any,
) -> ProteinModel:
    """Load a model and its tokenizer from a Hub repository or a folder.

    Args:
        cls: the class that loads the model: `MLXAutoModel` for `embed` and `contacts`, otherwise
            `MLXAutoModelForMaskedLM`.
        model: a Hub repository or a folder.
        revision: branch, tag or commit; None for main.
        dtype: see `MLXPreTrainedModel.from_pretrained`.
        activation_dtype: see `MLXPreTrainedModel.from_pretrained`.
        device: "cpu" or "gpu"; None for MLX's default.
        long: how to treat proteins that are longer than the position table; see `ProteinModel`.
        batch_tokens: maximum tokens of a batch, padding included; None for what suits the device and its memory.
        output: the output of a run. A resumed run keeps its batch size.
        weights: load the weights. False reads only the config and the tokenizer; `ProteinModel.load` loads the weights.
        hub: `token`, `cache_dir`, `subfolder`, `local_files_only` and `force_download` of `from_pretrained`, for model
            and tokenizer.

    Raises:
        UserError: an option has an unknown value, or the tokenizer does not belong to the model.
        OSError: the model or its tokenizer is not found.

    Example:
        >>> load_protein_model(MLXAutoModel, "facebook/esm2_t6_8M_UR50D", long="window")
    """
    from mlx_esm_hf.models.auto import MLXAutoModel, open_checkpoint, refuse_folding, tokenizer_place

    check_loading(model, dtype, activation_dtype, device, long, batch_tokens)
    use_device(device)
    checkpoint = open_checkpoint(cls, model, revision, **hub)
    if checkpoint.config.model_type == "esmfold2":
        refuse_folding(model)
    check_activation_dtype(activation_dtype, checkpoint.config, model)
    place, where = tokenizer_place(model, {"revision": revision or "main"} | hub | checkpoint.commit)
    tokenizer = load_tokenizer(place, **where)
    opened = ProteinModel(
        checkpoint,
        tokenizer,
        shown_name(model),
        checkpoint.commit.get("revision", revision),
        long,
        batch_tokens or earlier_settings(output).get("batch_tokens", 0),
        # `MLXAutoModel` loads no head and does not use the pooler, so missing and unused keys are not reported.
        {"dtype": dtype, "activation_dtype": activation_dtype, "report": cls is not MLXAutoModel},
    )
    if weights:
        opened.load()
    return opened


def check_loading(
    model: Any = None,
    dtype: str | None = None,
    activation_dtype: str | None = None,
    device: str | None = None,
    long: str = "error",
    batch_tokens: int | None = None,
    **others: Any,
) -> None:
    """Check options of `load_protein_model` before anything slow is imported or read.

    Nothing is checked for a model that is already loaded: `as_protein_model` refuses any option for it.

    Raises:
        UserError: an option has an unknown value.
    """
    if isinstance(model, ProteinModel):
        return
    if dtype is not None:
        check_dtype(dtype)
    if activation_dtype is not None:
        check_choice("activation_dtype", activation_dtype, ["int8"])
    if device is not None:
        check_choice("device", device, DEVICES)
    check_choice("long", long, LONG)
    if batch_tokens is not None:
        check_integer("batch_tokens", batch_tokens, 1)


def agreed(batch_tokens: int, wanted: int) -> int:
    """Agree with all ranks on the tokens of a batch, as all must make the same batches.

    Args:
        batch_tokens: the choice of this rank.
        wanted: what the caller or an earlier run wants; 0 for no preference. Only rank 0 is certain to see the output
            of an earlier run.
    """
    decided = wanted > 0 or distributed.is_rank_0()
    return distributed.all_min(batch_tokens if decided else 1 << 30)


def load_network(cls: Any, model: str, **options: Any) -> Any:
    """Load a model without its tokenizer.

    `MLXAutoModel` loads no head and does not use the pooler, so missing and unused keys are not reported.
    """
    from mlx_esm_hf.models.auto import MLXAutoModel

    return cls.from_pretrained(model, report=cls is not MLXAutoModel, **options)


def same_commit(network: Any) -> dict[str, str]:
    """Return `{"revision": commit}` of a loaded model, so that its tokenizer is loaded from the same commit.

    Empty for a model that is not from the Hub.
    """
    commit = getattr(network.config, "_commit_hash", None)
    return {"revision": commit} if commit else {}


def as_protein_model(
    cls: Any, model: str | os.PathLike[str] | ProteinModel, output: Any, loading: dict[str, Any]
) -> ProteinModel:
    """Return a model that is already loaded, or open it without loading its weights.

    Raises:
        TypeError: loading options were given for a model that is already loaded.
        UserError: `cls` predicts tokens, and the tokenizer has no mask token; or see `load_protein_model`.
    """
    from mlx_esm_hf.models.auto import MLXAutoModelForMaskedLM

    if not isinstance(model, ProteinModel):
        model = load_protein_model(cls, os.fspath(model), output=output, weights=False, **loading)
    elif loading:
        raise TypeError(f"{', '.join(loading)}: options of `load_protein_model`, but the model is already loaded.")
    if cls is MLXAutoModelForMaskedLM:
        refuse_without_mask(model.vocabulary)
    return model


def known_settings_of(model: Any) -> dict[str, Any]:
    """Return those of `settings_of` that do not depend on the weights."""
    return {"model": model.name, "revision": model.revision, "device": device_name()}


def settings_of(model: Any) -> dict[str, Any]:
    """Return the settings of a model that results depend on."""
    settings = known_settings_of(model) | {
        "weights": fingerprint(model.network),
        "dtype": str(model.network.dtype).removeprefix("mlx.core."),
        "batch_tokens": model.batch_tokens,
    }
    if has_int8_activations(model.network):
        settings["activation_dtype"] = "int8"
    return settings


NAMED = 3  # parameters in a message


def damage(network: MLXPreTrainedModel) -> str:
    """Return which parameters of a network are NaN or infinite, or so large that their squares overflow; "" if none."""
    from mlx_esm_hf.loading import unusable_parameters

    if not (names := unusable_parameters(network)):
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"Damaged parameters: {', '.join(names[:NAMED])}{more}. {advice(network.dtype)}"


def advice(dtype: mx.Dtype) -> str:
    """Return what to do about results that are NaN or infinite."""
    if dtype == mx.float16:
        return "Values above 65,504 overflow in float16: use float32 (--dtype float32)."
    return "The checkpoint may be damaged: download it again, or choose another one."


def fingerprint(network: MLXPreTrainedModel) -> str:
    """Return a hash that tells checkpoints apart, whatever their names.

    It covers up to 1,024 elements of each parameter that came from the checkpoint.
    """
    digest = hashlib.sha256()
    parameters: Any = tree_flatten(network.parameters())
    for name, parameter in sorted(parameters, key=lambda pair: pair[0]):
        if name in network.newly_initialized:
            continue
        flat = parameter.reshape(-1)
        sample = flat[:: -(-flat.size // 1024)].astype(mx.float32)
        digest.update(name.encode() + np.array(sample).tobytes())
    return digest.hexdigest()[:16]
