"""Load a LoRA adapter from a folder or the Hub, merge it, and predict."""

import csv

import mlx.core as mx
import numpy as np
from peft import PeftConfig
from transformers import AutoTokenizer

from mlx_esm_hf import MLXAutoModelForSequenceClassification, load_adapter, merge_adapters

adapter = "my-lab/esm2-location-lora"
config = PeftConfig.from_pretrained(adapter)
print(config.base_model_name_or_path, config.r, sorted(config.target_modules))
model = MLXAutoModelForSequenceClassification.from_pretrained(config.base_model_name_or_path, num_labels=3)
tokenizer = AutoTokenizer.from_pretrained(config.base_model_name_or_path)
load_adapter(model, adapter)
merge_adapters(model)
model.eval()
model.save_pretrained("merged")
tokenizer.save_pretrained("merged")

merged = MLXAutoModelForSequenceClassification.from_pretrained("merged")

with open("proteins.csv") as file:
    rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
batch = tokenizer([row["sequence"] for row in rows], padding=True, return_tensors="mlx")
probs = mx.softmax(merged(**batch).logits, axis=1)
confidence, predicted = probs.max(axis=1), probs.argmax(axis=1)
for row, label, p in zip(rows, predicted.tolist(), confidence.tolist()):
    print(row["id"], merged.config.id2label[label], f"{p:.4f}")
print("labels", np.unique(predicted).tolist(), "counts", np.bincount(predicted, minlength=3).tolist())
