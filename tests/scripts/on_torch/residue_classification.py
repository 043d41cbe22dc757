"""Fine-tune ESM-2 to predict the secondary structure of each residue."""

import csv

import numpy as np
import torch
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

checkpoint = "my-lab/esm2-structure"
label2id = {"H": 0, "E": 1, "C": 2}
id2label = {v: k for k, v in label2id.items()}
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModelForTokenClassification.from_pretrained(checkpoint, id2label=id2label, label2id=label2id)

# Train the last layer and the classifier only.
for name, param in model.named_parameters():
    param.requires_grad = name.startswith(("classifier", "esm.encoder.layer.2"))
print("trainable", sum(p.numel() for p in model.parameters() if p.requires_grad))


class StructureDataset(torch.utils.data.Dataset):
    def __init__(self, split):
        with open("proteins.csv") as file:
            self.rows = [row for row in csv.DictReader(file) if row["split"] == split]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        item = tokenizer(row["sequence"], truncation=True, max_length=128)
        item["labels"] = [-100] + [label2id[letter] for letter in row["structure"]] + [-100]
        return item


def compute_metrics(p):
    predictions, labels = p
    predictions = np.argmax(predictions, axis=2)
    kept = labels != -100
    accuracy = (predictions == labels)[kept].mean()
    return {"accuracy": accuracy, "residues": kept.sum()}


training_args = TrainingArguments(
    "secondary-structure",
    learning_rate=3e-3,
    per_device_train_batch_size=18,
    num_train_epochs=4,
    lr_scheduler_type="cosine",
    logging_steps=1,
    eval_strategy="no",
    save_strategy="no",
    report_to=[],
    seed=1,
)
trainer = Trainer(
    model,
    training_args,
    train_dataset=StructureDataset("train"),
    eval_dataset=StructureDataset("test"),
    data_collator=DataCollatorForTokenClassification(tokenizer),
    compute_metrics=compute_metrics,
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print("losses", [round(loss, 4) for loss in losses])
metrics = trainer.evaluate()
print({key: round(float(metrics[key]), 4) for key in ("eval_loss", "eval_accuracy", "eval_residues")})

model.eval()
sequence = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEG"
inputs = tokenizer(sequence, return_tensors="pt").to(model.device)
with torch.no_grad():
    predicted = model(**inputs).logits.argmax(-1)[0, 1:-1]
print("".join(model.config.id2label[i] for i in predicted.tolist()))
