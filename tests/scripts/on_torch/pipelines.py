"""Use the pipelines: fill a mask, extract features, and classify proteins and residues."""

import numpy as np
import torch
from transformers import AutoTokenizer, EsmForTokenClassification, pipeline

device = 0 if torch.cuda.is_available() else -1
sequence = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDK"

fill_mask = pipeline("fill-mask", model="facebook/esm2_t6_8M_UR50D", device=device)
masked = sequence[:10] + fill_mask.tokenizer.mask_token + sequence[11:]
for answer in fill_mask(masked, top_k=4):
    print(answer["token_str"], answer["token"], f"{answer['score']:.4f}")

extract = pipeline("feature-extraction", model="facebook/esm2_t6_8M_UR50D", device=device)
features = np.array(extract(sequence))
print(features.shape, np.round(features[0, 1:-1].mean(axis=0)[:5], 4))

classify = pipeline("text-classification", model="my-lab/esm2-location", top_k=None, device=device)
for prediction in classify([sequence, sequence[::-1]], batch_size=2):
    print({answer["label"]: round(answer["score"], 4) for answer in prediction})

checkpoint = "my-lab/esm2-structure"
model = EsmForTokenClassification.from_pretrained(checkpoint)
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
label = pipeline("token-classification", model=model, tokenizer=tokenizer, device=device)
residues = [token for token in label(sequence) if token["word"] not in tokenizer.all_special_tokens]
print("".join(token["entity"][-1] for token in residues))
print(f"lowest {min(token['score'] for token in residues):.4f}")
