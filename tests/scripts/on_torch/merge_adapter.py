"""Load a LoRA adapter from a folder or the Hub, merge it, and predict."""

import csv

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

adapter = "my-lab/esm2-location-lora"
config = PeftConfig.from_pretrained(adapter)
print(config.base_model_name_or_path, config.r, sorted(config.target_modules))
base = AutoModelForSequenceClassification.from_pretrained(config.base_model_name_or_path, num_labels=3)
tokenizer = AutoTokenizer.from_pretrained(config.base_model_name_or_path)
model = PeftModel.from_pretrained(base, adapter)
model = model.merge_and_unload()
model.eval()
model.save_pretrained("merged")
tokenizer.save_pretrained("merged")

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
merged = AutoModelForSequenceClassification.from_pretrained("merged").to(device)

with open("proteins.csv") as file:
    rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
batch = tokenizer([row["sequence"] for row in rows], padding=True, return_tensors="pt")
batch = {k: v.to(device) for k, v in batch.items()}
with torch.inference_mode():
    probs = torch.nn.functional.softmax(merged(**batch).logits, dim=1)
confidence, predicted = probs.max(1)
for row, label, p in zip(rows, predicted.tolist(), confidence.tolist()):
    print(row["id"], merged.config.id2label[label], f"{p:.4f}")
print("labels", torch.unique(predicted).tolist(), "counts", torch.bincount(predicted, minlength=3).tolist())
