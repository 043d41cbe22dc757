"""Design peptides for a target: append masks to its sequence and fill them in, as PepMLM does."""

import mlx.core as mx
import numpy as np
from transformers import AutoTokenizer

from mlx_esm_hf import MLXEsmForMaskedLM

MODEL = "facebook/esm2_t6_8M_UR50D"
PEPTIDE_LENGTH = 9
TOP_K = 3

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = MLXEsmForMaskedLM.from_pretrained(MODEL)

target = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
inputs = tokenizer(target + tokenizer.mask_token * PEPTIDE_LENGTH, return_tensors="mlx")


def pseudo_perplexity(target, peptide):
    ids = tokenizer.encode(target + peptide, return_tensors="mlx")
    total = 0
    for offset in range(len(peptide)):
        position = -2 - offset
        masked = mx.array(ids)
        masked[0, position] = tokenizer.mask_token_id
        labels = mx.full_like(ids, -100)
        labels[0, position] = ids[0, position]
        total += model(masked, labels=labels).loss.item()
    return mx.exp(mx.array(total / len(peptide))).item()


# Sample each masked position from its k most probable residues.
mx.random.seed(7)
logits = model(**inputs).logits
mask_positions = mx.array(np.nonzero(inputs["input_ids"] == tokenizer.mask_token_id)[1])
residue_ids = mx.array(tokenizer.convert_tokens_to_ids(list("ACDEFGHIKLMNPQRSTVWY")))
at_masks = logits[0, mask_positions][:, residue_ids]
top_indices = mx.argsort(-at_masks, axis=-1)[:, :TOP_K]
top_values = mx.take_along_axis(at_masks, top_indices, axis=-1)
probabilities = mx.softmax(top_values, axis=-1)
print("masks", mask_positions.tolist())
print(" ".join(f"{value:.4f}" for value in probabilities.max(axis=-1).tolist()))

for _ in range(4):
    choice = mx.random.categorical(mx.log(probabilities))
    sampled = residue_ids[mx.take_along_axis(top_indices, choice[..., None], axis=-1).squeeze(-1)]
    peptide = tokenizer.decode(sampled.tolist()).replace(" ", "")
    assert len(peptide) == PEPTIDE_LENGTH
    assert all((row == token).any() for row, token in zip(residue_ids[top_indices], sampled))

# Greedy: fill in the most confident position, and predict again.
ids = mx.array(inputs["input_ids"])
while (ids == tokenizer.mask_token_id).any():
    probs = mx.softmax(model(ids).logits[0], axis=-1)[:, residue_ids]
    confidence, choice = probs.max(axis=-1), probs.argmax(axis=-1)
    confidence = mx.where(ids[0] != tokenizer.mask_token_id, -1.0, confidence)
    position = confidence.argmax()
    ids[0, position] = residue_ids[choice[position]]
binder = tokenizer.decode(ids[0, mask_positions].tolist()).replace(" ", "")
print(f"binder {binder} pseudo-perplexity {pseudo_perplexity(target, binder):.4f}")
