"""Fine-tune ESM-2 to predict the stability of a protein, and report Spearman's rank correlation."""

import csv

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_squared_error
from transformers import EsmForSequenceClassification, EsmTokenizer, Trainer, TrainingArguments

MODEL = "my-lab/esm2-stability"
tokenizer = EsmTokenizer.from_pretrained(MODEL)
model = EsmForSequenceClassification.from_pretrained(MODEL, num_labels=1, problem_type="regression")

with open("proteins.csv") as handle:
    table = list(csv.DictReader(handle))
train = [row for row in table if row["split"] == "train"]
test = [row for row in table if row["split"] == "test"]
targets = np.array([float(row["stability"]) for row in train])
mean, std = targets.mean(), targets.std()


def encode(rows):
    data = []
    for row in rows:
        item = dict(tokenizer(row["sequence"], padding="max_length", truncation=True, max_length=40))
        item["label"] = (float(row["stability"]) - mean) / std
        data.append(item)
    return data


def compute_metrics(eval_pred):
    predictions, labels = eval_pred.predictions.squeeze(), eval_pred.label_ids.squeeze()
    return {
        "spearman": spearmanr(predictions, labels).statistic,
        "pearson": pearsonr(predictions, labels)[0],
        "rmse": np.sqrt(mean_squared_error(labels, predictions)),
    }


training_args = TrainingArguments(
    output_dir="./results",
    num_train_epochs=6,
    per_device_train_batch_size=6,
    gradient_accumulation_steps=3,
    per_device_eval_batch_size=64,
    learning_rate=2e-3,
    warmup_steps=1,
    max_grad_norm=0.5,
    logging_steps=2,
    eval_strategy="steps",
    eval_steps=2,
    save_strategy="no",
    report_to="none",
)
trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=encode(train),
    eval_dataset=encode(test),
    compute_metrics=compute_metrics,
)
trainer.train()
for entry in trainer.state.log_history:
    numbers = {
        key: entry[key] for key in ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_rmse") if key in entry
    }
    print(entry["step"], {key: round(value, 5) for key, value in numbers.items()})
print({name: round(float(trainer.evaluate()[f"eval_{name}"]), 4) for name in ("spearman", "pearson", "rmse")})
predictions = trainer.predict(encode(test)).predictions.flatten() * std + mean
for row, prediction in zip(test, predictions):
    print(row["id"], row["stability"], f"{prediction:.3f}")
