"""Rank proteins by pseudo-perplexity, masking each position once, and by the likelihood of one forward pass."""

import csv
import math

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import EsmForMaskedLM, EsmTokenizer

name = "facebook/esm2_t6_8M_UR50D"
tokenizer = EsmTokenizer.from_pretrained(name)
model = EsmForMaskedLM.from_pretrained(name)
model.eval()
for p in model.parameters():
    p.requires_grad = False

with open("proteins.csv") as file:
    proteins = [(row["id"], row["sequence"]) for row in csv.DictReader(file)][:6]


def pseudo_perplexity(sequence, batch_size=8):
    ids = tokenizer(sequence, return_tensors="pt").input_ids.squeeze(0)
    length = ids.size(0) - 2
    repeated = ids.unsqueeze(0).repeat(length, 1)
    positions = torch.arange(1, length + 1)
    hidden = torch.eye(ids.size(0), dtype=torch.bool)[positions]
    masked = repeated.masked_fill(hidden, tokenizer.mask_token_id)
    losses = []
    for chunk, sites in zip(masked.split(batch_size), positions.split(batch_size)):
        logits = model(chunk).logits
        at_masks = logits[torch.arange(len(chunk)), sites]
        losses.append(F.cross_entropy(at_masks, ids[sites], reduction="none"))
    return math.exp(torch.cat(losses).mean().item())


def one_pass(sequences):
    ids = pad_sequence(
        [torch.tensor(tokenizer.encode(sequence)) for sequence in sequences],
        batch_first=True,
        padding_value=tokenizer.pad_token_id,
    )
    attention_mask = ids.ne(tokenizer.pad_token_id).long()
    log_probs = model(ids, attention_mask=attention_mask).logits.log_softmax(dim=-1)
    chosen = log_probs.gather(dim=-1, index=ids.unsqueeze(-1)).squeeze(-1)
    residues = attention_mask.bool() & (ids != tokenizer.cls_token_id) & (ids != tokenizer.eos_token_id)
    return (chosen * residues).sum(dim=-1) / residues.sum(dim=-1), chosen[residues]


fast, per_residue = one_pass([sequence for _, sequence in proteins])
scores = {protein: pseudo_perplexity(sequence) for protein, sequence in proteins}
for protein, score in sorted(scores.items(), key=lambda item: item[1]):
    print(protein, f"{score:.4f}")
print([round(value, 4) for value in fast.tolist()])
print(per_residue.shape[0], f"{per_residue.mean():.4f} {per_residue.std(unbiased=False):.4f}")
