"""`pipeline(task)` with the same results as that of transformers."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from transformers import PreTrainedTokenizerBase

from mlx_esm_hf.checks import check_choice, check_integer
from mlx_esm_hf.data.tokenizer import load_tokenizer
from mlx_esm_hf.data.vocabulary import refuse_other_tokenizer
from mlx_esm_hf.errors import NonFiniteError, UserError
from mlx_esm_hf.jobs.protein_model import SHARED, advice, damage, load_network, same_commit
from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.models.auto import (
    MLXAutoModel,
    MLXAutoModelForMaskedLM,
    MLXAutoModelForSequenceClassification,
    MLXAutoModelForTokenClassification,
    tokenizer_place,
)
from mlx_esm_hf.runtime.device import use_torch_device


def pipeline(
    task: str,
    model: str | os.PathLike[str] | MLXPreTrainedModel,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
    *,
    device: int | str | None = None,
    batch_size: int = 1,
    model_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> Pipeline:
    """Return a callable for a task, like transformers' function of the same name.

    Args:
        task: "fill-mask", "feature-extraction", "text-classification" ("sentiment-analysis") or "token-classification"
            ("ner").
        model: a Hub repository, a folder, or a model, which needs `tokenizer` as well.
        tokenizer: a tokenizer, or the repository or folder of one; None for that of the model.
        device: "cpu" or -1, "gpu", "cuda", "mps" or 0; None for MLX's default. It becomes the default device of the
            whole process.
        batch_size: sequences that go through the model together.
        model_kwargs: more options of the model's `from_pretrained`.
        options: options of the pipeline, such as `top_k`, which calls use unless they give another value; `revision`,
            `token`, `cache_dir`, `subfolder`, `local_files_only` and `force_download`, which apply to model and
            tokenizer; and other options of the model's `from_pretrained`. `framework`, `use_fast` and `num_workers` are
            ignored.

    Raises:
        KeyError: the task is unknown.
        TypeError: an unknown option.
        UserError: a model without a tokenizer or with that of another model, or a device that does not exist.

    Example:
        >>> pipeline("fill-mask", model="facebook/esm2_t6_8M_UR50D")("MKT<mask>YIAKQR")[0]["token_str"]
    """
    task = ALIASES.get(task, task)
    if task not in TASKS:
        raise KeyError(f"Unknown task {task}, available tasks are {sorted(TASKS)}")
    if device is not None:
        use_torch_device(device)
    pipeline_class, auto_class = TASKS[task]
    names = pipeline_class.option_names()
    call_options = {name: value for name, value in options.items() if name in names}
    loading = {name: value for name, value in options.items() if name not in names | IGNORED} | (model_kwargs or {})
    if isinstance(model, MLXPreTrainedModel):
        if tokenizer is None:
            raise UserError("A model passed as an object needs its tokenizer: pipeline(..., tokenizer=...).")
        network = model
    else:
        tokenizer = tokenizer or model
        network = load_network(auto_class, os.fspath(model), **loading)
    if isinstance(tokenizer, (str, os.PathLike)):
        shared = {name: loading[name] for name in SHARED if name in loading}
        if tokenizer == model:
            shared |= same_commit(network)
        place, where = tokenizer_place(os.fspath(tokenizer), shared)
        tokenizer = load_tokenizer(place, **where)
    refuse_other_tokenizer(tokenizer, network.config, network.residues, network.config._name_or_path)
    return pipeline_class(network.eval(), tokenizer, batch_size, **call_options)


class Pipeline:
    """Base class of the pipelines: it runs texts through the tokenizer and the model in batches.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        batch_size: sequences that go through the model together.
        options: options of `results`, which calls use unless they give another value.
    """

    # Options of the tokenizer that `pipeline` passes to calls and not to `from_pretrained`.
    tokenizer_options: ClassVar[frozenset[str]] = frozenset()
    # Yields the result of each text, given the texts, a batch size and options. Subclasses define it.
    results: ClassVar[Callable[..., Iterator[Any]]]

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 1, **options: Any) -> None:
        check_integer("batch_size", batch_size, 1)
        self.model, self.tokenizer, self.batch_size, self.options = model, tokenizer, batch_size, options

    def __call__(
        self,
        inputs: str | Iterable[str],
        *,
        batch_size: int | None = None,
        num_workers: int | None = None,
        **options: Any,
    ) -> Any:
        """Return the results for one or several sequences.

        Args:
            inputs: a sequence, a list or tuple of sequences, or another iterable, such as a generator or a data set.
            batch_size: sequences that go through the model together; None for that of the pipeline.
            num_workers: ignored.
            options: see the method `results` of the task's class.

        Returns:
            The result for a sequence; a list of results for a list or tuple; for another iterable an iterator, which
            computes each batch when it is needed.

        Raises:
            TypeError: an unknown option.
            UserError: see `results`.
        """
        if batch_size is not None:
            check_integer("batch_size", batch_size, 1)
        texts = [inputs] if isinstance(inputs, str) else inputs
        results = self.results(texts, batch_size or self.batch_size, **self.options | options)
        if not isinstance(texts, list | tuple):
            return results
        return self.unwrapped(list(results), isinstance(inputs, str), options)

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """Return the names of the options of `results`."""
        parameters = inspect.signature(cls.results).parameters.values()
        return cls.tokenizer_options | {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}

    def unwrapped(self, results: list[Any], is_single: bool, options: dict[str, Any]) -> Any:
        """Return the results as transformers does: a single sequence gives its result, not a list.

        Args:
            results: the results.
            is_single: whether the input was a sequence and not a list.
            options: options of the call.
        """
        return results[0] if is_single else results

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write model and tokenizer as a folder for `pipeline`."""
        self.model.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)

    def _outputs(
        self, texts: Iterable[str], batch_size: int, options: dict[str, Any]
    ) -> Iterator[tuple[np.ndarray, mx.array]]:
        """Yield the token ids [L] of each text, without padding, and the model's output.

        The output is the logits, or the last hidden state of a model without logits: [L, ...] without padding, unless
        the model gives one answer per sequence.

        Raises:
            NonFiniteError: an answer is NaN or infinite.
        """
        remaining, number = iter(texts), 0
        while batch := list(islice(remaining, batch_size)):
            padding = {} if len(batch) == 1 else {"padding": True}
            encoded = self.tokenizer(batch, return_tensors="np", **{**padding, **options})
            outputs = self.model(encoded["input_ids"], encoded["attention_mask"], return_dict=True)
            answers = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
            for ids, mask, answer in zip(encoded["input_ids"], encoded["attention_mask"], answers, strict=True):
                number += 1
                real = np.flatnonzero(mask)
                answer = answer[mx.array(real)] if answer.ndim > 1 else answer
                if not mx.isfinite(answer).all():
                    reason = damage(self.model) or advice(self.model.dtype)
                    raise NonFiniteError(f"The result of sequence {number} is NaN or infinite. {reason}")
                yield ids[real], answer


class FillMaskPipeline(Pipeline):
    """Predicts the most probable tokens at each <mask>, over the whole vocabulary, like transformers' class."""

    def results(
        self,
        texts: Iterable[str],
        batch_size: int,
        *,
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
    ) -> Iterator[Any]:
        """Yield the predictions for each text.

        A text with one mask gives a list of {"score", "token", "token_str", "sequence"}, one with several masks a list
        of such lists.

        Args:
            texts: sequences, each with at least one <mask>.
            batch_size: sequences that go through the model together.
            top_k: predictions for each mask.
            targets: rank only these tokens. A target that is not in the vocabulary is replaced by its first token, with
                a warning.
            tokenizer_kwargs: options of the tokenizer.

        Raises:
            UserError: a sequence without a mask, or no target that the tokenizer knows.
        """
        allowed = None if targets is None else self._target_ids([targets] if isinstance(targets, str) else targets)
        for ids, logits in self._outputs(texts, batch_size, tokenizer_kwargs or {}):
            yield self._proposals(ids, logits, top_k, allowed)

    def unwrapped(self, results: list[Any], is_single: bool, options: dict[str, Any]) -> Any:
        """Return the results. A list of one sequence gives its only result, as in transformers."""
        return results[0] if len(results) == 1 else results

    def _proposals(self, ids: np.ndarray, logits: mx.array, top_k: int, allowed: np.ndarray | None) -> list[Any]:
        masked = np.flatnonzero(ids == self.tokenizer.mask_token_id)
        if not len(masked):
            raise UserError(f"No mask_token ({self.tokenizer.mask_token}) found on the input")
        probabilities = np.array(mx.softmax(logits[mx.array(masked)].astype(mx.float32), axis=-1, precise=True))
        if allowed is not None:
            probabilities = probabilities[:, allowed]
        result = []
        for place, row in zip(masked, probabilities, strict=True):
            proposals = []
            for choice in np.argsort(-row, kind="stable")[:top_k]:
                token = int(choice if allowed is None else allowed[choice])
                filled = ids.copy()
                filled[place] = token
                # Other masks are special tokens as well and must stay in the sequence.
                sequence = self.tokenizer.decode(filled.tolist(), skip_special_tokens=len(masked) == 1)
                proposals.append(
                    {
                        "score": float(row[choice]),
                        "token": token,
                        "token_str": self.tokenizer.decode([token]),
                        "sequence": sequence,
                    }
                )
            result.append(proposals)
        return result[0] if len(masked) == 1 else result

    def _target_ids(self, targets: Sequence[str]) -> np.ndarray:
        vocabulary = self.tokenizer.get_vocab()
        ids = set()
        for target in targets:
            token = vocabulary.get(target)
            if token is None:
                pieces = self.tokenizer(target, add_special_tokens=False)["input_ids"]
                if not pieces:
                    continue
                token = pieces[0]
                name = self.tokenizer.convert_ids_to_tokens(token)
                warnings.warn(f"The target {target!r} is not in the vocabulary; {name} is used instead.", stacklevel=3)
            ids.add(token)
        if not ids:
            raise UserError("At least one target must be provided when passed.")
        return np.array(list(ids))


class FeatureExtractionPipeline(Pipeline):
    """Returns the last hidden state of all tokens, special tokens included, like transformers' class."""

    def results(
        self,
        texts: Iterable[str],
        batch_size: int,
        *,
        truncation: bool | None = None,
        return_tensors: bool = False,
        tokenize_kwargs: dict[str, Any] | None = None,
    ) -> Iterator[Any]:
        """Yield the features of each text as nested lists [1, tokens, hidden_size].

        Args:
            texts: sequences.
            batch_size: sequences that go through the model together.
            truncation: whether the tokenizer truncates.
            return_tensors: yield an `mx.array` instead of nested lists.
            tokenize_kwargs: options of the tokenizer.

        Raises:
            UserError: `truncation` is also in `tokenize_kwargs`.
        """
        options = dict(tokenize_kwargs or {})
        if truncation is not None:
            if "truncation" in options:
                raise UserError("truncation is given twice, once in tokenize_kwargs.")
            options["truncation"] = truncation
        for _, states in self._outputs(texts, batch_size, options):
            yield states[None] if return_tensors else states[None].astype(mx.float32).tolist()


class TextClassificationPipeline(Pipeline):
    """Predicts the label of a whole sequence, like transformers' class."""

    tokenizer_options = frozenset({"truncation", "padding", "max_length"})

    def results(
        self,
        texts: Iterable[str],
        batch_size: int,
        *,
        top_k: int | None | str = "",
        function_to_apply: str | None = None,
        **tokenizer_kwargs: Any,
    ) -> Iterator[Any]:
        """Yield {"label", "score"} of each text, or a list of them with `top_k`.

        Args:
            texts: sequences.
            batch_size: sequences that go through the model together.
            top_k: number of labels, the most probable first; None for all; "" for only the first, not in a list.
            function_to_apply: "sigmoid", "softmax" or "none". None chooses "none" for regression, "sigmoid" for a
                single label or labels that do not exclude each other, and "softmax" otherwise.
            tokenizer_kwargs: options of the tokenizer.

        Raises:
            UserError: `function_to_apply` is unknown.
        """
        names = self.model.config.id2label
        for _, logits in self._outputs(texts, batch_size, tokenizer_kwargs):
            scores = np.array(self._scores(logits.astype(mx.float32), function_to_apply))
            order = np.argsort(-scores, kind="stable").tolist()
            labels = [{"label": names[i], "score": float(scores[i])} for i in order]
            if top_k == "":
                yield labels[0]
            else:
                yield labels if top_k is None else labels[: int(top_k)]

    def unwrapped(self, results: list[Any], is_single: bool, options: dict[str, Any]) -> Any:
        """Return the results. A single sequence gives its own result only if the call sets `top_k`."""
        return results[0] if is_single and "top_k" in options else results

    def _scores(self, logits: mx.array, function_to_apply: str | None) -> mx.array:
        config = self.model.config
        if function_to_apply is None:
            if config.problem_type == "regression":
                function_to_apply = "none"
            elif config.problem_type == "multi_label_classification" or config.num_labels == 1:
                function_to_apply = "sigmoid"
            else:
                function_to_apply = "softmax"
        if function_to_apply == "sigmoid":
            return mx.sigmoid(logits)
        if function_to_apply == "softmax":
            return mx.softmax(logits, axis=-1, precise=True)
        if function_to_apply == "none":
            return logits
        raise UserError(f"function_to_apply must be sigmoid, softmax or none, got {function_to_apply!r}.")


class TokenClassificationPipeline(Pipeline):
    """Predicts the label of each residue, such as its secondary structure, like transformers' class."""

    def results(
        self,
        texts: Iterable[str],
        batch_size: int,
        *,
        aggregation_strategy: str = "none",
        ignore_labels: Sequence[str] = ("O",),
    ) -> Iterator[Any]:
        """Yield the labels of each text.

        A text gives a list of {"entity", "score", "index", "word", "start", "end"}, or of {"entity_group", "score",
        "word", "start", "end"} for runs. `start` and `end` are None, as ESM's tokenizer does not provide them.

        Args:
            texts: sequences.
            batch_size: sequences that go through the model together.
            aggregation_strategy: "none" for a result for each residue; "simple" for one for each run of the same label.
            ignore_labels: labels to leave out.

        Raises:
            UserError: `aggregation_strategy` is unknown.
        """
        check_choice("aggregation_strategy", aggregation_strategy, ["none", "simple"])
        for ids, logits in self._outputs(texts, batch_size, {}):
            entities = self._entities(ids, logits)
            if aggregation_strategy == "simple":
                entities = self._runs(entities)
            key = "entity" if aggregation_strategy == "none" else "entity_group"
            yield [entity for entity in entities if entity[key] not in ignore_labels]

    def _entities(self, ids: np.ndarray, logits: mx.array) -> list[dict[str, Any]]:
        scores = np.array(mx.softmax(logits.astype(mx.float32), axis=-1, precise=True))
        special = self.tokenizer.get_special_tokens_mask(ids.tolist(), already_has_special_tokens=True)
        entities = []
        for index in np.flatnonzero(np.array(special) == 0):
            best = int(scores[index].argmax())
            entities.append(
                {
                    "entity": self.model.config.id2label[best],
                    "score": scores[index, best],
                    "index": int(index),
                    "word": self.tokenizer.convert_ids_to_tokens(int(ids[index])),
                    "start": None,
                    "end": None,
                }
            )
        return entities

    def _runs(self, entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Merge neighbours with the same label. The prefix "B-" begins a new run, "I-" continues one."""
        number, last, numbers = 0, None, []
        for entity in entities:
            name = entity["entity"].removeprefix("B-").removeprefix("I-")
            if name != last or entity["entity"].startswith("B-"):
                number, last = number + 1, name
            numbers.append(number)
        runs = []
        for _, group in groupby(zip(numbers, entities, strict=True), key=lambda pair: pair[0]):
            members = [entity for _, entity in group]
            runs.append(
                {
                    "entity_group": members[0]["entity"].split("-", 1)[-1],
                    "score": np.mean([entity["score"] for entity in members]),
                    "word": self.tokenizer.convert_tokens_to_string([entity["word"] for entity in members]),
                    "start": None,
                    "end": None,
                }
            )
        return runs


TASKS: dict[str, tuple[Any, Any]] = {
    "fill-mask": (FillMaskPipeline, MLXAutoModelForMaskedLM),
    "feature-extraction": (FeatureExtractionPipeline, MLXAutoModel),
    "text-classification": (TextClassificationPipeline, MLXAutoModelForSequenceClassification),
    "token-classification": (TokenClassificationPipeline, MLXAutoModelForTokenClassification),
}

ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}  # of transformers
IGNORED = {"framework", "use_fast", "num_workers"}  # arguments of transformers' function that have no effect here
