"""Embed proteins with ESM-2 and fit a linear classifier on the mean embeddings."""

import csv

import mlx.core as mx
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from transformers import AutoTokenizer

from mlx_esm_hf import MLXEsmModel

CHECKPOINT = "facebook/esm2_t6_8M_UR50D"
BATCH_SIZE = 5

tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
model = MLXEsmModel.from_pretrained(CHECKPOINT, add_pooling_layer=False)
model.eval()

with open("proteins.csv") as file:
    rows = list(csv.DictReader(file))


def embed(sequences):
    vectors = []
    for start in range(0, len(sequences), BATCH_SIZE):
        batch = sequences[start : start + BATCH_SIZE]
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=1024, return_tensors="mlx")
        hidden = model(**inputs).last_hidden_state
        mask = mx.broadcast_to(inputs["attention_mask"][..., None], hidden.shape).astype(mx.float32)
        mean = mx.sum(hidden * mask, axis=1) / mx.maximum(mask.sum(axis=1), 1e-9)
        vectors.append(np.array(mean))
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
