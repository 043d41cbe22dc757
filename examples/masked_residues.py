"""Which residues fit a masked position? Ported from masked_residues_transformers.py."""

import sys

import mlx.core as mx
from transformers import AutoTokenizer

from mlx_esm_hf import MLXEsmForMaskedLM

checkpoint = sys.argv[1] if len(sys.argv) > 1 else "facebook/esm2_t6_8M_UR50D"
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = MLXEsmForMaskedLM.from_pretrained(checkpoint)

# Human ubiquitin with its residue 27, a lysine, masked.
sequence = "MQIFVKTLTGKTITLEVEPSDTIENV<mask>AKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
inputs = tokenizer(sequence, return_tensors="mlx")

logits = model(**inputs).logits

position = (inputs["input_ids"][0] == tokenizer.mask_token_id).argmax().item()
probabilities = mx.softmax(logits[0, position], axis=-1)
for token in mx.argsort(-probabilities)[:5].tolist():
    print(f"{tokenizer.decode([token])}  {probabilities[token].item():.4f}")
