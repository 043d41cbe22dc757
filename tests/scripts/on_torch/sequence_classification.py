"""Fine-tune ESM-2 to predict where in the cell a protein is."""

import csv

import numpy as np
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

set_seed(42)
checkpoint = "my-lab/esm2-location"
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3)

with open("proteins.csv") as file:
    rows = list(csv.DictReader(file))


def make_dataset(split):
    chosen = [row for row in rows if row["split"] == split]
    encoded = tokenizer([row["sequence"] for row in chosen], truncation=True, max_length=512)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": int(row["location"])}
        for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], chosen)
    ]


def compute_metrics(eval_pred):
    logits, labels = eval_pred
    predictions = np.argmax(logits, axis=-1)
    return {
        "accuracy": accuracy_score(labels, predictions),
        "f1": f1_score(labels, predictions, average="macro"),
    }


train_dataset, test_dataset = make_dataset("train"), make_dataset("test")
args = TrainingArguments(
    output_dir="esm2-finetuned",
    eval_strategy="epoch",
    save_strategy="epoch",
    logging_strategy="epoch",
    learning_rate=1e-3,
    per_device_train_batch_size=32,
    per_device_eval_batch_size=4,
    num_train_epochs=5,
    weight_decay=0.01,
    warmup_steps=0.2,
    load_best_model_at_end=True,
    metric_for_best_model="eval_loss",
    save_total_limit=2,
    report_to="none",
    push_to_hub=False,
    fp16=False,
    dataloader_num_workers=0,
)
trainer = Trainer(
    model=model,
    args=args,
    train_dataset=train_dataset,
    eval_dataset=test_dataset,
    processing_class=tokenizer,
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=compute_metrics,
)
result = trainer.train()
print(f"training loss {result.training_loss:.4f} steps {result.global_step}")
for line in trainer.state.log_history:
    if "eval_loss" in line:
        print(f"epoch {line['epoch']:.0f} {line['eval_loss']:.4f} {line['eval_accuracy']:.4f} {line['eval_f1']:.4f}")

predictions = trainer.predict(test_dataset)
print(np.round(predictions.predictions, 3))
trainer.save_model("esm2-location-best")
again = AutoModelForSequenceClassification.from_pretrained("esm2-location-best")
print(again.config.num_labels, sum(p.numel() for p in again.parameters()))
