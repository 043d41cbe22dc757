"""Train embeddings on pairs: proteins of the same class are close, others far apart."""

import csv
from itertools import combinations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from transformers import AutoTokenizer

from mlx_esm_hf import MLXEsmModel

checkpoint = "facebook/esm2_t6_8M_UR50D"
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = MLXEsmModel.from_pretrained(checkpoint, add_pooling_layer=False)

with open("proteins.csv") as file:
    rows = [row for row in csv.DictReader(file) if row["split"] == "train"][:9]
pairs = list(combinations(range(len(rows)), 2))
sequences = [row["sequence"] for row in rows]
classes = mx.array([int(row["location"]) for row in rows])


def encode(batch):
    inputs = tokenizer(batch, return_tensors="mlx", padding=True)
    cls = model(**inputs).last_hidden_state[:, 0, :]
    return cls / mx.maximum(mx.linalg.norm(cls, axis=1, keepdims=True), 1e-12)


def contrastive_loss(a, b, same, margin=1.0):
    distance = mx.linalg.norm(a - b + 1e-6, axis=-1)
    return mx.mean(same * distance**2 + (1 - same) * mx.maximum(margin - distance, 0) ** 2)


def info_nce(embeddings, labels, temperature=0.1):
    similarity = embeddings @ embeddings.T / temperature
    itself = mx.eye(len(labels), dtype=mx.bool_)
    similarity = mx.where(itself, float("-inf"), similarity)
    positives = (labels[:, None] == labels[None, :]) & ~itself
    log_prob = similarity - mx.logsumexp(similarity, axis=1, keepdims=True)
    log_prob = mx.where(positives, log_prob, 0.0)
    return -(log_prob.sum(axis=1) / mx.maximum(positives.sum(axis=1), 1)).mean()


optimizer = optim.SGD(1e-3, momentum=0.9)
model.train()
same = mx.array([float(classes[i].item() == classes[j].item()) for i, j in pairs])


def loss_of_step():
    first = encode([sequences[i] for i, _ in pairs])
    second = encode([sequences[j] for _, j in pairs])
    return contrastive_loss(first, second, same) + 0.1 * info_nce(encode(sequences), classes)


loss_and_grad = nn.value_and_grad(model, loss_of_step)
for step in range(4):
    loss, grads = loss_and_grad()
    optimizer.update(model, tree_map(lambda g: mx.clip(g, -0.5, 0.5), grads))
    print(step, f"{loss.item():.4f}")

model.eval()
embeddings = encode(sequences)
cosine = embeddings @ embeddings.T  # the embeddings have length 1
cosine = mx.where(mx.eye(len(cosine), dtype=mx.bool_), -1, cosine)
nearest = cosine.argmax(axis=1)
print("nearest", nearest.tolist(), f"{(classes[nearest] == classes).mean().item():.4f}")
print(np.array(cosine[0]).round(4))
