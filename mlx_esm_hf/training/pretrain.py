"""Training a masked language model, new or pretrained; the job of `mlx-esm train`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from transformers.trainer_utils import TrainOutput

from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.tokenizer import load_tokenizer
from mlx_esm_hf.data.vocabulary import Vocabulary
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.models.auto import MLXAutoModelForMaskedLM
from mlx_esm_hf.models.esm.configuration_esm import MLXEsmConfig
from mlx_esm_hf.models.esm.modeling_esm import MLXEsmForMaskedLM
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.datasets import MaskedProteins, pad
from mlx_esm_hf.training.run_folder import DATA, training_folder
from mlx_esm_hf.training.token_store import open_store, split
from mlx_esm_hf.training.trainer import MLXTrainer


def new_model(layers: int, hidden_size: int, heads: int, seed: int = 0) -> tuple[MLXEsmForMaskedLM, Any]:
    """Return an ESM-2 of this shape with random weights, and its tokenizer.

    Args:
        layers: number of layers.
        hidden_size: width of the hidden states; must be a multiple of 2 × heads.
        heads: number of attention heads.
        seed: seed of the weights.
    """
    mx.random.seed(seed)
    tokenizer = esm2_tokenizer()
    config = MLXEsmConfig(  # type: ignore[call-arg]
        vocab_size=len(tokenizer.get_vocab()),
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        position_embedding_type="rotary",
        token_dropout=True,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return MLXEsmForMaskedLM(config), tokenizer


def pretrain(
    proteins: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    model: str | tuple[int, int, int],
    *,
    weights: Sequence[float] | None = None,
    validation: str | os.PathLike[str] | None = None,
    validation_share: float = 0.01,
    context: int = 512,
    report: Report | None = None,
    **arguments: Any,
) -> TrainOutput:
    """Train a masked language model with ESM's objective and write it as a folder for `from_pretrained`.

    Calling it again with the same arguments resumes an interrupted run.

    Args:
        proteins: FASTA files.
        output: a new folder, or the folder of an interrupted run.
        model: a Hub repository or folder to train further, or (layers, hidden size, heads) of a new ESM-2.
        weights: relative sampling frequency of each file; by default proportional to its size.
        validation: a FASTA file of validation data.
        validation_share: without `validation`, the fraction of the sequences to hold out; 0 means no validation.
        context: maximum number of tokens of a crop of a protein.
        report: collects what was changed in the files and which proteins were skipped.
        arguments: arguments of `MLXTrainingArguments`.

    Returns:
        transformers' `TrainOutput`.

    Raises:
        ValueError: a file is missing or contains no proteins, an argument is invalid, or the output folder contains
            something else.
    """
    report = report or Report()
    if weights is not None and (len(weights) != len(proteins) or min(weights) < 0 or sum(weights) <= 0):
        raise UserError(
            f"Expected a non-negative weight for each of the {len(proteins)} files, not all of them 0, "
            f"got {list(weights)}."
        )
    if not 0 <= validation_share < 1:
        raise UserError(f"validation_share must be in [0, 1), got {validation_share}.")
    with training_folder(output) as resumes:
        args = MLXTrainingArguments(output, **arguments)
        if isinstance(model, tuple):
            network, tokenizer = new_model(*model, seed=args.seed)
        else:
            network, tokenizer = MLXAutoModelForMaskedLM.from_pretrained(model), load_tokenizer(model)
        vocabulary = Vocabulary(tokenizer, "this model")
        context = min(context, network.max_tokens or context)
        folder = Path(output) / DATA
        stores = [open_store(path, folder / str(i), vocabulary, report) for i, path in enumerate(proteins)]
        share = 0.0 if validation is not None else validation_share
        parts = [split(store, share) for store in stores]
        held_out = [(store, indices) for store, (_, indices) in zip(stores, parts, strict=True) if len(indices)]
        if validation is not None:
            store = open_store(validation, folder / "validation", vocabulary, report)
            held_out = [(store, np.arange(len(store)))]
        training = [(store, indices) for store, (indices, _) in zip(stores, parts, strict=True)]
        trainer = MLXTrainer(
            network,
            args,
            data_collator=lambda features: pad(features, vocabulary.pad),
            train_dataset=MaskedProteins(training, vocabulary, context, args.seed, weights),
            eval_dataset=MaskedProteins(held_out, vocabulary, context, args.seed + 1) if held_out else None,
            processing_class=tokenizer,
        )
        result = trainer.train(resume_from_checkpoint=resumes)
        trainer.save_model()
    return result
