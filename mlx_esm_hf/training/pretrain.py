"""Training a masked language model, new or pretrained; the job of `mlx-esm train`."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_esm_hf.checks import check_integer, check_number
from mlx_esm_hf.data.proteins import Report
from mlx_esm_hf.data.source import check_fasta, is_stream
from mlx_esm_hf.data.tokenizer import load_tokenizer
from mlx_esm_hf.data.vocabulary import Vocabulary, refuse_without_mask
from mlx_esm_hf.demo import shown_name
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.settings import checksum_of_model, content
from mlx_esm_hf.training.token_store import TokenStore, open_store, split

if TYPE_CHECKING:  # these imports take seconds, and torch with them
    from transformers.trainer_utils import TrainOutput

    from mlx_esm_hf.models.esm.modeling_esm import MLXEsmForMaskedLM

MOST_LAYERS, MOST_WIDTH = 1000, 1 << 20  # of a new model


def new_model(layers: int, hidden_size: int, heads: int, seed: int = 0) -> tuple[MLXEsmForMaskedLM, Any]:
    """Return an ESM-2 of this shape with random weights, and its tokenizer.

    Args:
        layers: number of layers.
        hidden_size: width of the hidden states; must be a multiple of 2 × heads.
        heads: number of attention heads.
        seed: seed of the weights.

    Raises:
        UserError: a size is invalid.
    """
    from mlx_esm_hf.models.esm.configuration_esm import MLXEsmConfig
    from mlx_esm_hf.models.esm.modeling_esm import MLXEsmForMaskedLM
    from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer

    check_shape(layers, hidden_size, heads)
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


def check_shape(layers: int, hidden_size: int, heads: int) -> None:
    """Check the sizes of a new model.

    Raises:
        UserError: a size is not an integer within bounds, or the hidden size does not suit the heads.
    """
    check_integer("layers", layers, 1, MOST_LAYERS)
    check_integer("hidden_size", hidden_size, 1, MOST_WIDTH)
    check_integer("heads", heads, 1, MOST_WIDTH)
    if hidden_size % (2 * heads):
        raise UserError(f"hidden_size must be a multiple of twice the number of heads ({heads}), got {hidden_size}.")


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
    args = MLXTrainingArguments(output, **arguments)
    for weight in weights or ():
        check_number("weights", weight, 0)
    if weights is not None and (len(weights) != len(proteins) or not 0 < sum(weights) < math.inf):
        raise UserError(
            f"weights must be a non-negative number for each of the {len(proteins)} files, not all of them 0, "
            f"got {list(weights)}."
        )
    check_number("validation_share", validation_share, 0, below=1)
    check_integer("context", context, 3)
    for path in [*proteins, *([] if validation is None else [validation])]:
        if is_stream(os.fspath(path)):
            raise UserError(f"{path} must be a FASTA file: training cannot read proteins from anything else.")
        check_fasta(os.fspath(path))

    from mlx_esm_hf.models.auto import MLXAutoModelForMaskedLM, open_checkpoint
    from mlx_esm_hf.training.datasets import MaskedProteins, pad
    from mlx_esm_hf.training.run_folder import DATA, training_folder
    from mlx_esm_hf.training.trainer import MLXTrainer

    origin: Any
    with training_folder(output) as resumes:
        if isinstance(model, tuple):
            network, tokenizer = new_model(*model, seed=args.seed)
            origin = f"a new one of shape {','.join(map(str, model))}"
            known: Any = network
        else:
            known = open_checkpoint(MLXAutoModelForMaskedLM, model)
            network, tokenizer = None, load_tokenizer(model, **known.commit)
        vocabulary = Vocabulary(tokenizer, "this model" if isinstance(model, tuple) else model, known.config.vocab_size)
        refuse_without_mask(vocabulary)
        context = min(context, known.max_tokens or context)
        folder = Path(output) / DATA
        stores = [open_store(path, folder / str(i), vocabulary, report) for i, path in enumerate(proteins)]
        share = 0.0 if validation is not None else validation_share
        parts = [split(store, share) for store in stores]
        held_out = [(store, indices) for store, (_, indices) in zip(stores, parts, strict=True) if len(indices)]
        if validation is not None:
            store = open_store(validation, folder / "validation", vocabulary, report)
            held_out = [(store, np.arange(len(store)))]
        training = [(store, indices) for store, (indices, _) in zip(stores, parts, strict=True)]
        if network is None:
            network = known.load()
            origin = content(shown_name(known.source), checksum_of_model(network))
        trainer = MLXTrainer(
            network,
            args,
            data_collator=lambda features: pad(features, vocabulary.pad),
            train_dataset=MaskedProteins(training, vocabulary, context, args.seed, weights),
            eval_dataset=MaskedProteins(held_out, vocabulary, context, args.seed + 1) if held_out else None,
            processing_class=tokenizer,
        )
        trainer.settings = {
            "training data": contents(proteins, stores),
            "validation data": contents([validation], [held_out[0][0]]) if validation else contents(proteins, stores),
            "validation_share": None if validation is not None else validation_share,
            "weights": None if weights is None else list(weights),
            "context": context,
            "model": origin,
        }
        result = trainer.train(resume_from_checkpoint=resumes)
        trainer.save_model()
    return result


def contents(paths: Sequence[str | os.PathLike[str]], stores: Sequence[TokenStore]) -> dict[str, str]:
    """Return the setting for FASTA files: their names and the checksum of their proteins."""
    names = ", ".join(os.path.basename(path) for path in paths)
    return content(names, hashlib.sha256(" ".join(store.sha256 for store in stores).encode()).hexdigest())
