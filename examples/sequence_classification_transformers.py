"""Classify whole proteins. The original for torch; compare with sequence_classification.py."""

import sys

import torch
from transformers import AutoTokenizer, EsmForSequenceClassification

checkpoint = sys.argv[1]  # one that was trained to classify proteins
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = EsmForSequenceClassification.from_pretrained(checkpoint)

# Melittin of the honey bee, which bursts red blood cells, and human insulin's B chain, which does not.
sequences = ["GIGAVLKVLTTGLPALISWIKRKRQQ", "FVNQHLCGSHLVEALYLVCGERGFFYTPKT"]
inputs = tokenizer(sequences, padding=True, return_tensors="pt")

with torch.no_grad():
    logits = model(**inputs).logits

for sequence, scores in zip(sequences, torch.softmax(logits, dim=-1), strict=True):
    label = scores.argmax().item()
    print(f"{sequence[:10]}…  {model.config.id2label[label]}  {scores[label].item():.4f}")
