"""Design peptides for a target: append masks to its sequence and fill them in, as PepMLM does."""

import torch
from torch.distributions import Categorical
from transformers import AutoTokenizer, EsmForMaskedLM

MODEL = "facebook/esm2_t6_8M_UR50D"
PEPTIDE_LENGTH = 9
TOP_K = 3

device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = EsmForMaskedLM.from_pretrained(MODEL).to(device)

target = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
inputs = tokenizer(target + tokenizer.mask_token * PEPTIDE_LENGTH, return_tensors="pt").to(device)


def pseudo_perplexity(target, peptide):
    ids = tokenizer.encode(target + peptide, return_tensors="pt").to(device)
    total = 0
    for offset in range(len(peptide)):
        position = -2 - offset
        masked = ids.clone()
        masked[0, position] = tokenizer.mask_token_id
        labels = torch.full_like(ids, -100)
        labels[0, position] = ids[0, position]
        with torch.no_grad():
            total += model(masked, labels=labels).loss.item()
    return torch.exp(torch.tensor(total / len(peptide))).item()


# Sample each masked position from its k most probable residues.
torch.manual_seed(7)
with torch.no_grad():
    logits = model(**inputs).logits
mask_positions = (inputs["input_ids"] == tokenizer.mask_token_id).nonzero(as_tuple=True)[1]
residue_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list("ACDEFGHIKLMNPQRSTVWY")), device=device)
at_masks = logits[0, mask_positions][:, residue_ids]
top_values, top_indices = at_masks.topk(TOP_K, dim=-1)
probabilities = torch.softmax(top_values, dim=-1)
print("masks", mask_positions.tolist())
print(" ".join(f"{value:.4f}" for value in probabilities.max(dim=-1).values.tolist()))

for _ in range(4):
    choice = Categorical(probabilities).sample()
    sampled = residue_ids[top_indices.gather(-1, choice.unsqueeze(-1)).squeeze(-1)]
    peptide = tokenizer.decode(sampled.tolist()).replace(" ", "")
    assert len(peptide) == PEPTIDE_LENGTH
    assert all((row == token).any() for row, token in zip(residue_ids[top_indices], sampled))

# Greedy: fill in the most confident position, and predict again.
ids = inputs["input_ids"].clone()
while (ids == tokenizer.mask_token_id).any():
    with torch.no_grad():
        probs = model(ids).logits[0].softmax(-1)[:, residue_ids]
    confidence, choice = probs.max(dim=-1)
    confidence = confidence.masked_fill(ids[0] != tokenizer.mask_token_id, -1.0)
    position = confidence.argmax()
    ids[0, position] = residue_ids[choice[position]]
binder = tokenizer.decode(ids[0, mask_positions].tolist()).replace(" ", "")
print(f"binder {binder} pseudo-perplexity {pseudo_perplexity(target, binder):.4f}")
