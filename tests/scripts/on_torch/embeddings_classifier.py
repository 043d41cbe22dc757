"""Embed proteins with ESM-2 and fit a linear classifier on the mean embeddings."""

import csv

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from transformers import AutoTokenizer, EsmModel

CHECKPOINT = "facebook/esm2_t6_8M_UR50D"
BATCH_SIZE = 5

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
model = EsmModel.from_pretrained(CHECKPOINT, add_pooling_layer=False).to(device)
model.eval()

with open("proteins.csv") as file:
    rows = list(csv.DictReader(file))


def embed(sequences):
    vectors = []
    for start in range(0, len(sequences), BATCH_SIZE):
        batch = sequences[start : start + BATCH_SIZE]
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=1024, return_tensors="pt").to(device)
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).expand(hidden.size()).float()
        mean = torch.sum(hidden * mask, dim=1) / torch.clamp(mask.sum(dim=1), min=1e-9)
        vectors.append(mean.cpu().numpy())
    return np.concatenate(vectors, axis=0)


def load(split):
    chosen = [row for row in rows if row["split"] == split]
    return embed([row["sequence"] for row in chosen]), [int(row["location"]) for row in chosen]


train_x, train_y = load("train")
test_x, test_y = load("test")
print("embeddings", train_x.shape, test_x.shape)
for vector in test_x:
    print(" ".join(f"{value:.4f}" for value in vector[:6]))

classifier = LogisticRegression(C=0.1, max_iter=1000)
classifier.fit(train_x, train_y)
print(f"accuracy {accuracy_score(test_y, classifier.predict(test_x)):.3f}")
print(np.round(classifier.predict_proba(test_x), 3))
