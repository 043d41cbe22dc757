"""Small trainings, shared by the tests of the trainer, its loop and its checkpoints."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
import transformers

import mlx_esm_hf
from mlx_esm_hf import MLXEsmConfig, MLXEsmForMaskedLM
from mlx_esm_hf.models.esm.tokenization_esm import esm2_tokenizer
from mlx_esm_hf.training.arguments import MLXTrainingArguments
from mlx_esm_hf.training.evaluator import LOG
from mlx_esm_hf.training.trainer import MLXTrainer
from tests.tiny import tiny

OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class InOrder:
    """A data set that the trainer does not shuffle."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def order(self, seed, epoch):
        return np.arange(len(self.rows))


def masked_rows(count, seed=0):
    """Return rows of several lengths with pairs of equal residues, so that a model can learn to fill in the mask."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        ids = np.repeat(rng.integers(4, 24, rng.integers(3, 15)), 2)
        labels = np.where(rng.random(len(ids)) < 0.3, ids, -100)
        inputs = np.where(labels > 0, 32, ids)
        rows.append({"input_ids": [0, *inputs.tolist(), 2], "labels": [-100, *labels.tolist(), -100]})
    return rows


def classified_rows(count, seed=0):
    """Return rows whose class is the half of the alphabet that is in the majority, with an extra text column."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        ids = rng.integers(4, 24, rng.integers(5, 25))
        rows.append({"input_ids": [0, *ids.tolist(), 2], "label": int((ids < 14).mean() > 0.5), "name": "protein"})
    return rows


def padded(rows):
    return dict(transformers.DataCollatorForTokenClassification(esm2_tokenizer(), return_tensors="np")(rows))


def twins(head, folder, **settings):
    """Return the same random model in MLX and in torch."""
    torch.manual_seed(0)
    theirs = getattr(transformers, f"Esm{head}")(transformers.EsmConfig(**tiny("ESM-2", **OFF, **settings)))
    theirs.save_pretrained(folder / "initial")
    return getattr(mlx_esm_hf, f"MLXEsm{head}").from_pretrained(folder / "initial"), theirs


def losses_of(folder):
    lines = [json.loads(line) for line in (Path(folder) / LOG).read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def small_training(folder, **settings):
    mx.random.seed(0)
    model = MLXEsmForMaskedLM(MLXEsmConfig(**tiny("ESM-2", **settings.pop("config", OFF))))
    settings = {"max_steps": 24, "logging_steps": 1, "save_steps": 4, "learning_rate": 1e-3, **settings}
    args = MLXTrainingArguments(folder, **settings)
    return MLXTrainer(model, args, padded, masked_rows(70), masked_rows(10, seed=1), esm2_tokenizer())
