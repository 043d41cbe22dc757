"""Rank proteins by pseudo-perplexity, masking each position once, and by the likelihood of one forward pass."""

import csv
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from transformers import EsmTokenizer

from mlx_esm_hf import MLXEsmForMaskedLM

name = "facebook/esm2_t6_8M_UR50D"
tokenizer = EsmTokenizer.from_pretrained(name)
model = MLXEsmForMaskedLM.from_pretrained(name)
model.eval()
model.freeze()

with open("proteins.csv") as file:
    proteins = [(row["id"], row["sequence"]) for row in csv.DictReader(file)][:6]


def pseudo_perplexity(sequence, batch_size=8):
    ids = tokenizer(sequence, return_tensors="mlx").input_ids.squeeze(0)
    length = ids.shape[0] - 2
    repeated = mx.tile(ids[None], (length, 1))
    positions = mx.arange(1, length + 1)
    hidden = mx.eye(ids.shape[0], dtype=mx.bool_)[positions]
    masked = mx.where(hidden, tokenizer.mask_token_id, repeated)
    losses = []
    cuts = range(batch_size, length, batch_size)
    for chunk, sites in zip(mx.split(masked, cuts), mx.split(positions, cuts)):
        logits = model(chunk).logits
        at_masks = logits[mx.arange(len(chunk)), sites]
        losses.append(nn.losses.cross_entropy(at_masks, ids[sites], reduction="none"))
    return math.exp(mx.concatenate(losses).mean().item())


def one_pass(sequences):
    ids = tokenizer(sequences, padding=True, return_tensors="mlx")["input_ids"]
    attention_mask = (ids != tokenizer.pad_token_id).astype(mx.int32)
    log_probs = nn.log_softmax(model(ids, attention_mask=attention_mask).logits, axis=-1)
    chosen = mx.take_along_axis(log_probs, ids[..., None], axis=-1).squeeze(-1)
    residues = attention_mask.astype(mx.bool_) & (ids != tokenizer.cls_token_id) & (ids != tokenizer.eos_token_id)
    return (chosen * residues).sum(axis=-1) / residues.sum(axis=-1), np.array(chosen)[np.array(residues)]


fast, per_residue = one_pass([sequence for _, sequence in proteins])
scores = {protein: pseudo_perplexity(sequence) for protein, sequence in proteins}
for protein, score in sorted(scores.items(), key=lambda item: item[1]):
    print(protein, f"{score:.4f}")
print([round(value, 4) for value in fast.tolist()])
print(per_residue.shape[0], f"{per_residue.mean():.4f} {per_residue.std():.4f}")
