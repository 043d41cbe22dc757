"""Fine-tune ESM-2 to predict several terms of a protein at once."""

import csv

import torch
from sklearn.metrics import average_precision_score, f1_score
from transformers import AutoTokenizer, EsmForSequenceClassification, Trainer, TrainingArguments

TERMS = ["binding", "transport", "kinase", "membrane"]
checkpoint = "my-lab/esm2-terms"
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = EsmForSequenceClassification.from_pretrained(
    checkpoint,
    problem_type="multi_label_classification",
    num_labels=len(TERMS),
    id2label=dict(enumerate(TERMS)),
    label2id={term: i for i, term in enumerate(TERMS)},
)


class ProteinDataset(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.encodings = tokenizer([row["sequence"] for row in rows], padding=True, return_tensors="pt")
        self.labels = torch.tensor([[float(term) for term in row["terms"]] for row in rows])

    def __getitem__(self, idx):
        item = {key: value[idx] for key, value in self.encodings.items()}
        item["labels"] = self.labels[idx]
        return item

    def __len__(self):
        return self.labels.shape[0]


def compute_metrics(p):
    logits = p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions
    probabilities = torch.sigmoid(torch.from_numpy(logits)).numpy()
    predicted = (probabilities > 0.5).astype(int)
    return {
        "f1": f1_score(p.label_ids, predicted, average="micro"),
        "average_precision": average_precision_score(p.label_ids, probabilities, average="micro"),
    }


with open("proteins.csv") as file:
    proteins = list(csv.DictReader(file))
train = ProteinDataset([row for row in proteins if row["split"] == "train"])
test = ProteinDataset([row for row in proteins if row["split"] == "test"])

args = TrainingArguments(
    "terms",
    max_steps=6,
    per_device_train_batch_size=18,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    optim="adamw_torch",
    adam_beta2=0.98,
    save_strategy="no",
    report_to="none",
)
trainer = Trainer(model, args, train_dataset=train, eval_dataset=test, compute_metrics=compute_metrics)
before = trainer.evaluate()
trainer.train()
after = trainer.evaluate()
for name in ("eval_loss", "eval_f1", "eval_average_precision"):
    print(name, f"{before[name]:.4f} {after[name]:.4f}")

batch = tokenizer("MKWVTFISLLFLFSSAYS", return_tensors="pt").to(trainer.model.device)
trainer.model.eval()
probabilities = trainer.model(**batch).logits.sigmoid().squeeze().tolist()
print({term: round(probability, 4) for term, probability in zip(TERMS, probabilities)})
