"""`pipeline(task)` with the same results as that of transformers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import mlx.core as mx
import numpy as np
from transformers import PreTrainedTokenizerBase

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
)
from mlx_esm_hf.runtime.device import use_torch_device


def pipeline(
    task: str,
    model: str | os.PathLike[str] | MLXPreTrainedModel,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
    *,
    device: int | str | None = None,
    batch_size: int = 1,
    **loading: Any,
) -> Pipeline:
    """Return a callable for a task, like transformers' function of the same name.

    Args:
        task: "fill-mask", "feature-extraction", "text-classification" or "token-classification".
        model: a Hub repository, a folder, or a model, which needs `tokenizer` as well.
        tokenizer: a tokenizer, or the repository or folder of one; None for that of the model.
        device: "cpu" or -1, "gpu", "cuda", "mps" or 0; None for MLX's default. It becomes the default device of the
            whole process.
        batch_size: sequences that go through the model together.
        loading: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only` and `force_download`, which apply to
            model and tokenizer, and other options of the model's `from_pretrained`.

    Raises:
        KeyError: the task is unknown.
        UserError: a model without a tokenizer or with that of another model, or a device that does not exist.

    Example:
        >>> pipeline("fill-mask", model="facebook/esm2_t6_8M_UR50D")("MKT<mask>YIAKQR")[0]["token_str"]
    """
    if task not in TASKS:
        raise KeyError(f"Unknown task {task}, available tasks are {sorted(TASKS)}")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}.")
    if device is not None:
        use_torch_device(device)
    pipeline_class, auto_class = TASKS[task]
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
        tokenizer = load_tokenizer(os.fspath(tokenizer), **shared)
    refuse_other_tokenizer(tokenizer, network.config, network.residues, network.config._name_or_path)
    return pipeline_class(network.eval(), tokenizer, batch_size)


class Pipeline:
    """Base class of the pipelines: it runs texts through the tokenizer and the model in batches.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        batch_size: sequences that go through the model together.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 1) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def _outputs(self, texts: Sequence[str], options: dict[str, Any]) -> Iterator[tuple[np.ndarray, mx.array]]:
        """Yield the token ids [L] of each text, without padding, and the model's output.

        The output is the logits, or the last hidden state of a model without logits: [L, ...] without padding, unless
        the model gives one answer per sequence.

        Raises:
            NonFiniteError: an answer is NaN or infinite.
        """
        for start in range(0, len(texts), self.batch_size):
            batch = list(texts[start : start + self.batch_size])
            padding = {} if len(batch) == 1 else {"padding": True}
            encoded = self.tokenizer(batch, return_tensors="np", **{**padding, **options})
            outputs = self.model(encoded["input_ids"], encoded["attention_mask"], return_dict=True)
            answers = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
            rows = zip(encoded["input_ids"], encoded["attention_mask"], answers, strict=True)
            for number, (ids, mask, answer) in enumerate(rows, start + 1):
                real = np.flatnonzero(mask)
                answer = answer[mx.array(real)] if answer.ndim > 1 else answer
                if not mx.isfinite(answer).all():
                    reason = damage(self.model) or advice(self.model.dtype)
                    raise NonFiniteError(f"The result of sequence {number} is NaN or infinite. {reason}")
                yield ids[real], answer


class FillMaskPipeline(Pipeline):
    """Predicts the most probable tokens at each <mask>, over the whole vocabulary, like transformers' class."""

    def __call__(
        self,
        inputs: str | Sequence[str],
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Fill masks.

        Args:
            inputs: a sequence or several, each with at least one <mask>.
            top_k: predictions for each mask.
            targets: rank only these tokens. A target that is not in the vocabulary is replaced by its first token, with
                a warning.
            tokenizer_kwargs: options of the tokenizer.

        Returns:
            For a sequence with one mask, a list of {"score", "token", "token_str", "sequence"}; with several masks, a
            list of such lists. For several sequences, a list of their results (for a list of one, its only result).

        Raises:
            UserError: a sequence without a mask, or no target that the tokenizer knows.
        """
        allowed = None if targets is None else self._target_ids([targets] if isinstance(targets, str) else targets)
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        results = [
            self._proposals(ids, logits, top_k, allowed) for ids, logits in self._outputs(texts, tokenizer_kwargs or {})
        ]
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

    def __call__(
        self,
        inputs: str | Sequence[str],
        truncation: bool | None = None,
        return_tensors: bool = False,
        tokenize_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Extract features.

        Args:
            inputs: a sequence or several.
            truncation: whether the tokenizer truncates.
            return_tensors: return an `mx.array` [1, tokens, hidden_size] for each sequence instead of nested lists.
            tokenize_kwargs: options of the tokenizer.

        Returns:
            A result for a sequence; a list of results for several.

        Raises:
            UserError: `truncation` is also in `tokenize_kwargs`.
        """
        options = dict(tokenize_kwargs or {})
        if truncation is not None:
            if "truncation" in options:
                raise UserError("truncation is given twice, once in tokenize_kwargs.")
            options["truncation"] = truncation
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        features = [states[None] for _, states in self._outputs(texts, options)]
        results = features if return_tensors else [states.astype(mx.float32).tolist() for states in features]
        return results[0] if isinstance(inputs, str) else results


class TextClassificationPipeline(Pipeline):
    """Predicts the label of a whole sequence, like transformers' class."""

    def __call__(
        self,
        inputs: str | Sequence[str],
        top_k: int | None | str = "",
        function_to_apply: str | None = None,
        **tokenizer_kwargs: Any,
    ) -> list[Any]:
        """Classify sequences.

        Args:
            inputs: a sequence or several.
            top_k: number of labels, the most probable first; None for all; "" for only the first, not in a list.
            function_to_apply: "sigmoid", "softmax" or "none". None chooses "none" for regression, "sigmoid" for a
                single label or labels that do not exclude each other, and "softmax" otherwise.
            tokenizer_kwargs: options of the tokenizer.

        Returns:
            {"label", "score"} for each sequence, or a list of them with `top_k`. With `top_k`, a single sequence gives
            its own list.

        Raises:
            UserError: `function_to_apply` is unknown.
        """
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        names = self.model.config.id2label
        results: list[Any] = []
        for _, logits in self._outputs(texts, tokenizer_kwargs):
            scores = np.array(self._scores(logits.astype(mx.float32), function_to_apply))
            order = np.argsort(-scores, kind="stable").tolist()
            labels = [{"label": names[i], "score": float(scores[i])} for i in order]
            if top_k == "":
                results.append(labels[0])
            else:
                results.append(labels if top_k is None else labels[: int(top_k)])
        return results[0] if isinstance(inputs, str) and top_k != "" else results

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

    def __call__(
        self,
        inputs: str | Sequence[str],
        aggregation_strategy: str = "none",
        ignore_labels: Sequence[str] = ("O",),
    ) -> list[Any]:
        """Classify residues.

        Args:
            inputs: a sequence or several.
            aggregation_strategy: "none" for a result for each residue; "simple" for one for each run of the same label.
            ignore_labels: labels to leave out.

        Returns:
            For a sequence, a list of {"entity", "score", "index", "word", "start", "end"}, or of {"entity_group",
            "score", "word", "start", "end"} for runs; for several sequences, a list of such lists. `start` and `end`
            are None, as ESM's tokenizer does not provide them.

        Raises:
            UserError: `aggregation_strategy` is unknown.
        """
        if aggregation_strategy not in ("none", "simple"):
            raise UserError(f"aggregation_strategy must be none or simple, got {aggregation_strategy!r}.")
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        results = []
        for ids, logits in self._outputs(texts, {}):
            entities = self._entities(ids, logits)
            if aggregation_strategy == "simple":
                entities = self._runs(entities)
            key = "entity" if aggregation_strategy == "none" else "entity_group"
            results.append([entity for entity in entities if entity[key] not in ignore_labels])
        return results[0] if isinstance(inputs, str) else results

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
