"""Train a head of our own on EsmModel, with a lower learning rate for the encoder and a loop of our own."""

import csv

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, EsmModel, get_linear_schedule_with_warmup

CHECKPOINT = "facebook/esm2_t6_8M_UR50D"
EPOCHS, BATCH_SIZE = 3, 6


class StabilityModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.esm = EsmModel.from_pretrained(CHECKPOINT, add_pooling_layer=False)
        self.hidden = nn.Linear(self.esm.config.hidden_size, 16)
        self.activation = nn.ReLU()
        self.output = nn.Linear(16, 1)

    def forward(self, input_ids, attention_mask):
        states = self.esm(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).type_as(states)
        pooled = (states * mask).sum(1) / mask.sum(1)
        return self.output(self.activation(self.hidden(pooled))).squeeze(-1)


tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
model = StabilityModel()
random = np.random.default_rng(0)
with torch.no_grad():
    for layer in (model.hidden, model.output):
        layer.weight.copy_(torch.from_numpy(random.normal(size=layer.weight.shape) * 0.1))
        layer.bias.zero_()

for parameter in model.esm.embeddings.parameters():
    parameter.requires_grad = False
print("trainable", sum(p.numel() for p in model.parameters() if p.requires_grad))

optimizer = torch.optim.AdamW(
    [
        {"params": [p for p in model.esm.parameters() if p.requires_grad], "lr": 1e-4},
        {"params": [*model.hidden.parameters(), *model.output.parameters()], "lr": 5e-3},
    ],
    weight_decay=0.01,
)

with open("proteins.csv") as file:
    rows = list(csv.DictReader(file))
train = [row for row in rows if row["split"] == "train"]
test = [row for row in rows if row["split"] == "test"]
steps = EPOCHS * len(train) // BATCH_SIZE
scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=steps)
loss_fn = nn.MSELoss()


def collate(batch):
    inputs = tokenizer([row["sequence"] for row in batch], padding=True, return_tensors="pt")
    return inputs, torch.tensor([float(row["stability"]) for row in batch])


for epoch in range(EPOCHS):
    model.train()
    total = 0.0
    for start in range(0, len(train), BATCH_SIZE):
        inputs, targets = collate(train[start : start + BATCH_SIZE])
        optimizer.zero_grad()
        loss = loss_fn(model(**inputs), targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        rate = optimizer.param_groups[1]["lr"]
        optimizer.step()
        scheduler.step()
        total += loss.item()
    print(f"epoch {epoch} loss {total / 3:.4f} norm {norm.item():.4f} rate {rate:.6f}")

model.eval()
with torch.no_grad():
    inputs, targets = collate(test)
    print("test", round((model(**inputs) - targets).abs().mean().item(), 4))
torch.save(model.state_dict(), "stability.pt")
model.load_state_dict(torch.load("stability.pt"))
