"""Cross-validate a fine-tuning in k folds."""

import csv

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from transformers import AutoTokenizer, DataCollatorWithPadding

from mlx_esm_hf import MLXEsmForSequenceClassification, MLXTrainer, MLXTrainingArguments, set_seed

SEED = 3
CHECKPOINT = "my-lab/esm2-soluble"
tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)


def model_init():
    return MLXEsmForSequenceClassification.from_pretrained(CHECKPOINT, num_labels=2)


def compute_metrics(eval_pred):
    logits, labels = eval_pred
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    return {"auroc": roc_auc_score(labels, probabilities[:, 1]), "accuracy": np.mean(logits.argmax(1) == labels)}


with open("proteins.csv") as file:
    rows = list(csv.DictReader(file))
sequences = [row["sequence"] for row in rows]
labels = np.array([int(row["soluble"]) for row in rows])
encodings = tokenizer(sequences, truncation=True)


def subset(indices):
    return [{"input_ids": encodings["input_ids"][i], "labels": labels[i]} for i in indices]


folds = StratifiedKFold(n_splits=3, shuffle=True, random_state=SEED)
scores = []
for fold, (train_index, test_index) in enumerate(folds.split(sequences, labels)):
    set_seed(SEED)
    trainer = MLXTrainer(
        model_init=model_init,
        args=MLXTrainingArguments(
            output_dir=f"fold-{fold}",
            num_train_epochs=3,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
            seed=SEED,
        ),
        train_dataset=subset(train_index),
        eval_dataset=subset(test_index),
        data_collator=DataCollatorWithPadding(tokenizer, return_tensors="np"),
        compute_metrics=compute_metrics,
    )
    output = trainer.train()
    metrics = trainer.evaluate()
    scores.append(metrics["eval_auroc"])
    print(f"fold {fold}: {output.training_loss:.4f} {metrics['eval_loss']:.4f} {metrics['eval_auroc']:.4f}")
print(f"AUROC {np.mean(scores):.4f} ± {np.std(scores):.4f}")
