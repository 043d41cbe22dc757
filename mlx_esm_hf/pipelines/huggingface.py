"""`pipeline("fill-mask")` and `pipeline("feature-extraction")`, with what transformers' own return."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mlx_esm_hf.modeling_utils import MLXPreTrainedModel
from mlx_esm_hf.models.auto import MLXAutoModel, MLXAutoModelForMaskedLM
from mlx_esm_hf.pipelines.protein_model import load_network


def pipeline(
    task: str,
    model: str | MLXPreTrainedModel,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    **loading: Any,
) -> FillMaskPipeline | FeatureExtractionPipeline:
    """A callable for a task, as transformers' function of the same name.

    Args:
        task: "fill-mask" or "feature-extraction".
        model: a Hub repository or folder, or a model, which needs its tokenizer beside it.
        loading: `revision`, `dtype` and others of `from_pretrained`.

    Example:
        >>> pipeline("fill-mask", model="facebook/esm2_t6_8M_UR50D")("MKT<mask>YIAKQR")[0]["token_str"]
    """
    if task not in TASKS:
        raise KeyError(f"Unknown task {task}, available tasks are {sorted(TASKS)}")
    cls, auto_class = TASKS[task]
    if isinstance(model, MLXPreTrainedModel):
        if tokenizer is None:
            raise ValueError("A model that is given as an object needs its tokenizer: pipeline(..., tokenizer=...).")
        network = model
    else:
        tokenizer = tokenizer or model
        network = load_network(auto_class, model, **loading)
    if isinstance(tokenizer, str):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, revision=loading.get("revision", "main"))
    return cls(network.eval(), tokenizer)


class FillMaskPipeline:
    """transformers' `FillMaskPipeline`: for each <mask> the most probable tokens, over the whole vocabulary."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    def __call__(
        self,
        inputs: str | Sequence[str],
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """
        Args:
            inputs: one or several sequences, each with one <mask> at least.
            targets: rank these tokens only; of one that is not in the vocabulary its first token, with a warning.

        Returns:
            Of one sequence with one mask a list of {"score", "token", "token_str", "sequence"}; with several masks a
            list of such lists; of several sequences the list of their results (of a list of one, its only result).

        Raises:
            ValueError: a sequence without a mask, or no target that the tokenizer knows.
        """
        allowed = None if targets is None else self._target_ids([targets] if isinstance(targets, str) else targets)
        if isinstance(inputs, str):
            return self._fill(inputs, top_k, allowed, tokenizer_kwargs or {})
        outputs = [self._fill(text, top_k, allowed, tokenizer_kwargs or {}) for text in inputs]
        return outputs[0] if len(outputs) == 1 else outputs

    def _fill(self, text: str, top_k: int, allowed: np.ndarray | None, options: dict[str, Any]) -> list[Any]:
        encoded = self.tokenizer(text, return_tensors="np", **options)
        ids = encoded["input_ids"][0]
        masked = np.flatnonzero(ids == self.tokenizer.mask_token_id)
        if not len(masked):
            raise ValueError(f"No mask_token ({self.tokenizer.mask_token}) found on the input")
        logits = self.model(**encoded).logits[0, mx.array(masked)].astype(mx.float32)
        probabilities = np.array(mx.softmax(logits, axis=-1, precise=True))
        if allowed is not None:
            probabilities = probabilities[:, allowed]
        result = []
        for place, row in zip(masked, probabilities, strict=True):
            proposals = []
            for choice in np.argsort(-row, kind="stable")[:top_k]:
                token = int(choice if allowed is None else allowed[choice])
                filled = ids.copy()
                filled[place] = token
                filled = filled[filled != self.tokenizer.pad_token_id]
                # Other masks are special tokens, too, and have to stay.
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
                warnings.warn(f"The target {target!r} is not in the vocabulary: {name} takes its place.", stacklevel=3)
            ids.add(token)
        if not ids:
            raise ValueError("At least one target must be provided when passed.")
        return np.array(list(ids))


class FeatureExtractionPipeline:
    """transformers' `FeatureExtractionPipeline`: the last hidden state of all tokens, special ones included."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    def __call__(
        self,
        inputs: str | Sequence[str],
        truncation: bool | None = None,
        return_tensors: bool = False,
        tokenize_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """
        Args:
            return_tensors: an `mx.array` [1, tokens, hidden_size] for each sequence instead of nested lists.

        Returns:
            One result for a sequence, a list of them for several.
        """
        options = dict(tokenize_kwargs or {})
        if truncation is not None:
            if "truncation" in options:
                raise ValueError("truncation is given twice, once in tokenize_kwargs.")
            options["truncation"] = truncation
        if isinstance(inputs, str):
            return self._features(inputs, options, return_tensors)
        return [self._features(text, options, return_tensors) for text in inputs]

    def _features(self, text: str, options: dict[str, Any], return_tensors: bool) -> Any:
        features = self.model(**self.tokenizer(text, return_tensors="np", **options))[0]
        return features if return_tensors else features.astype(mx.float32).tolist()


TASKS: dict[str, tuple[Any, Any]] = {
    "fill-mask": (FillMaskPipeline, MLXAutoModelForMaskedLM),
    "feature-extraction": (FeatureExtractionPipeline, MLXAutoModel),
}
