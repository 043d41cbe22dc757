"""Fine-tune on unbalanced classes with a weighted loss, in a Trainer of our own."""

import csv

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from sklearn.metrics import matthews_corrcoef
from sklearn.utils.class_weight import compute_class_weight
from transformers import AutoTokenizer

from mlx_esm_hf import MLXAutoModelForSequenceClassification, MLXTrainer, MLXTrainingArguments

checkpoint = "my-lab/esm2-soluble"
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = MLXAutoModelForSequenceClassification.from_pretrained(checkpoint)

with open("proteins.csv") as file:
    rows = list(csv.DictReader(file))


def encode(split):
    rows_of_split = [row for row in rows if row["split"] == split]
    return [{**tokenizer(row["sequence"]), "labels": int(row["soluble"])} for row in rows_of_split]


train, test = encode("train"), encode("test")
labels = np.array([item["labels"] for item in train])
class_weights = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
class_weights = mx.array(class_weights).astype(mx.float32)
print("weights", class_weights.tolist())


class WeightedTrainer(MLXTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.get("logits")
        weights = class_weights[labels]
        losses = nn.losses.cross_entropy(logits.reshape(-1, self.model.config.num_labels), labels.reshape(-1))
        loss = (weights * losses).sum() / weights.sum()
        return (loss, outputs) if return_outputs else loss


def compute_metrics(eval_pred):
    logits, labels = eval_pred
    return {"mcc": matthews_corrcoef(labels, logits.argmax(-1))}


trainer = WeightedTrainer(
    model=model,
    args=MLXTrainingArguments(
        "weighted",
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        num_train_epochs=4,
        learning_rate=3e-3,
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=train,
    eval_dataset=test,
    processing_class=tokenizer,
    compute_metrics=compute_metrics,
)
trainer.train()
for entry in trainer.state.log_history:
    for name in ("loss", "eval_loss", "eval_mcc"):
        if name in entry:
            print(entry["step"], name, round(float(entry[name]), 4))
