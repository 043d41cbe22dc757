"""Classify whole proteins. Ported from sequence_classification_transformers.py."""

import sys

import mlx.core as mx
from transformers import AutoTokenizer

from mlx_esm_hf import MLXEsmForSequenceClassification

checkpoint = sys.argv[1]  # one that was trained to classify proteins
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = MLXEsmForSequenceClassification.from_pretrained(checkpoint)

# Melittin of the honey bee, which bursts red blood cells, and human insulin's B chain, which does not.
sequences = ["GIGAVLKVLTTGLPALISWIKRKRQQ", "FVNQHLCGSHLVEALYLVCGERGFFYTPKT"]
inputs = tokenizer(sequences, padding=True, return_tensors="mlx")

logits = model(**inputs).logits

for sequence, scores in zip(sequences, mx.softmax(logits, axis=-1), strict=True):
    label = scores.argmax().item()
    print(f"{sequence[:10]}…  {model.config.id2label[label]}  {scores[label].item():.4f}")
