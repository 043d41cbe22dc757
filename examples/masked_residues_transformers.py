"""Which residues fit a masked position? The original for torch; compare with masked_residues.py."""

import sys

import torch
from transformers import AutoTokenizer, EsmForMaskedLM

checkpoint = sys.argv[1] if len(sys.argv) > 1 else "facebook/esm2_t6_8M_UR50D"
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = EsmForMaskedLM.from_pretrained(checkpoint)

# Human ubiquitin with its residue 27, a lysine, masked.
sequence = "MQIFVKTLTGKTITLEVEPSDTIENV<mask>AKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
inputs = tokenizer(sequence, return_tensors="pt")

with torch.no_grad():
    logits = model(**inputs).logits

position = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
probabilities = torch.softmax(logits[0, position], dim=-1)
for token in torch.argsort(-probabilities)[:5].tolist():
    print(f"{tokenizer.decode([token])}  {probabilities[token].item():.4f}")
