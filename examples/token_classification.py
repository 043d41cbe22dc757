"""Label each residue of a protein. Ported from token_classification_transformers.py."""

import sys

from transformers import AutoTokenizer

from mlx_esm_hf import MLXEsmForTokenClassification

checkpoint = sys.argv[1]  # one that was trained to label residues, such as by their secondary structure
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = MLXEsmForTokenClassification.from_pretrained(checkpoint)

# Crambin, of the Abyssinian cabbage.
sequence = "TTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN"
inputs = tokenizer(sequence, return_tensors="mlx")

logits = model(**inputs).logits

labels = logits.argmax(axis=-1)[0, 1:-1].tolist()  # without <cls> and <eos>
for number, (residue, label) in enumerate(zip(sequence, labels, strict=True), start=1):
    print(f"{residue}{number}  {model.config.id2label[label]}")
