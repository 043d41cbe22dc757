"""Train a head of our own on EsmModel, with a lower learning rate for the encoder and a loop of our own."""

import csv

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from transformers import AutoTokenizer

from mlx_esm_hf import MLXEsmModel

CHECKPOINT = "facebook/esm2_t6_8M_UR50D"
EPOCHS, BATCH_SIZE = 3, 6


class StabilityModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.esm = MLXEsmModel.from_pretrained(CHECKPOINT, add_pooling_layer=False)
        self.hidden = nn.Linear(self.esm.config.hidden_size, 16)
        self.activation = nn.ReLU()
        self.output = nn.Linear(16, 1)

    def __call__(self, input_ids, attention_mask):
        states = self.esm(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].astype(states.dtype)
        pooled = (states * mask).sum(1) / mask.sum(1)
        return self.output(self.activation(self.hidden(pooled))).squeeze(-1)


tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
model = StabilityModel()
random = np.random.default_rng(0)
for layer in (model.hidden, model.output):
    layer.weight = mx.array(random.normal(size=layer.weight.shape) * 0.1).astype(mx.float32)
    layer.bias = mx.zeros_like(layer.bias)

model.esm.embeddings.freeze()
print("trainable", sum(p.size for _, p in tree_flatten(model.trainable_parameters())))

with open("proteins.csv") as file:
    rows = list(csv.DictReader(file))
train = [row for row in rows if row["split"] == "train"]
test = [row for row in rows if row["split"] == "test"]
steps = EPOCHS * len(train) // BATCH_SIZE


def adamw(peak):
    warmup, decay = optim.linear_schedule(0, peak, 2), optim.linear_schedule(peak, 0, steps - 2)
    return optim.AdamW(optim.join_schedules([warmup, decay], [2]), weight_decay=0.01, bias_correction=True)


optimizer = optim.MultiOptimizer([adamw(1e-4), adamw(5e-3)], [lambda name, _: name.startswith("esm.")])


def collate(batch):
    inputs = tokenizer([row["sequence"] for row in batch], padding=True, return_tensors="mlx")
    return inputs, mx.array([float(row["stability"]) for row in batch])


def loss_fn(inputs, targets):
    return nn.losses.mse_loss(model(**inputs), targets)


loss_and_grad = nn.value_and_grad(model, loss_fn)
for epoch in range(EPOCHS):
    model.train()
    total = 0.0
    for start in range(0, len(train), BATCH_SIZE):
        inputs, targets = collate(train[start : start + BATCH_SIZE])
        loss, grads = loss_and_grad(inputs, targets)
        grads, norm = optim.clip_grad_norm(grads, max_norm=1.0)
        optimizer.update(model, grads)
        total += loss.item()
    rate = optimizer.optimizers[1].learning_rate.item()
    print(f"epoch {epoch} loss {total / 3:.4f} norm {norm.item():.4f} rate {rate:.6f}")

model.eval()
inputs, targets = collate(test)
print("test", round((model(**inputs) - targets).abs().mean().item(), 4))
model.save_weights("stability.safetensors")
model.load_weights("stability.safetensors")
