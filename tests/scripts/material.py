"""Tiny checkpoints and data for the scripts, under the names that the scripts use."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from transformers import EsmConfig, EsmForProteinFolding

from mlx_esm_hf.models.esm.tokenization_esm import EsmTokenizer
from tests.models.esmfold.folding import perturb
from tests.tiny import tiny, tiny_folding
from tests.vocabulary import write_vocabulary

BASE = "facebook/esm2_t6_8M_UR50D"
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
COILS = set("GNPDSTQ")
STRANDS = set("VIYFWC")


def write_material(folder: Path) -> None:
    """Write all checkpoints and tables to a folder, in which the scripts are then run."""
    torch.manual_seed(0)
    save(folder / BASE, "EsmForMaskedLM")
    save(folder / "my-lab/esm2-location", "EsmForSequenceClassification", num_labels=3)
    save(folder / "my-lab/esm2-soluble", "EsmForSequenceClassification", num_labels=2)
    save(folder / "my-lab/esm2-stability", "EsmForSequenceClassification", num_labels=1)
    save(folder / "my-lab/esm2-terms", "EsmForSequenceClassification", num_labels=4)
    save(folder / "my-lab/esm2-structure", "EsmForTokenClassification", num_labels=3)
    perturb(EsmForProteinFolding(EsmConfig(**tiny_folding()))).save_pretrained(folder / "facebook/esmfold_v1")
    vocabulary = [*"ARNDCQEGHILKMFPSTWYVX", "<cls>", "<pad>", "<eos>", "<unk>", "<mask>"]  # of the published checkpoint
    (folder / "facebook/esmfold_v1/vocab.txt").write_text("\n".join(vocabulary))
    EsmTokenizer(str(folder / "facebook/esmfold_v1/vocab.txt")).save_pretrained(folder / "facebook/esmfold_v1")
    save_adapter(folder, "my-lab/esm2-location", "my-lab/esm2-location-lora")
    write_proteins(folder)


def save(folder: Path, architecture: str, **settings: Any) -> None:
    """Save a random model of transformers whose outputs differ well from residue to residue."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 1026}
    config = EsmConfig(**tiny(initializer_range=0.2, **off, **settings))
    getattr(transformers, architecture)(config).save_pretrained(folder)
    EsmTokenizer(write_vocabulary(folder)).save_pretrained(folder)


def save_adapter(folder: Path, base: str, name: str) -> None:
    """Save a LoRA adapter of PEFT that changes what its base model computes."""
    model = transformers.EsmForSequenceClassification.from_pretrained(folder / base)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder / name, save_embedding_layers=False)


def write_proteins(folder: Path) -> None:
    """Write proteins.csv: random proteins with labels that depend on their residues."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(24):
        location = number % 3
        frequencies = np.ones(20)
        frequencies[location * 6 : location * 6 + 6] = 4
        residues = random.choice(list(RESIDUES), size=random.integers(12, 31), p=frequencies / frequencies.sum())
        sequence = "".join(residues)
        structure = "".join("C" if r in COILS else "E" if r in STRANDS else "H" for r in sequence)
        stability = np.mean([r in "AILMFVW" for r in sequence]) * 4 - 1 + 0.1 * random.normal()
        terms = "".join(str(int(r in sequence)) for r in "CWHM")
        split = "test" if number % 4 == 3 else "train"
        rows.append(
            (f"P{number:05}", split, sequence, location, int(stability > 0), f"{stability:.3f}", terms, structure)
        )
    with open(folder / "proteins.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "split", "sequence", "location", "soluble", "stability", "terms", "structure"])
        writer.writerows(rows)
