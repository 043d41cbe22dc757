"""Label each residue of a protein. The original for torch; compare with token_classification.py."""

import sys

import torch
from transformers import AutoTokenizer, EsmForTokenClassification

checkpoint = sys.argv[1]  # one that was trained to label residues, such as by their secondary structure
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = EsmForTokenClassification.from_pretrained(checkpoint)

# Crambin, of the Abyssinian cabbage.
sequence = "TTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN"
inputs = tokenizer(sequence, return_tensors="pt")

with torch.no_grad():
    logits = model(**inputs).logits

labels = logits.argmax(dim=-1)[0, 1:-1].tolist()  # without <cls> and <eos>
for number, (residue, label) in enumerate(zip(sequence, labels, strict=True), start=1):
    print(f"{residue}{number}  {model.config.id2label[label]}")
