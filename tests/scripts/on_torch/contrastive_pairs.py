"""Train embeddings on pairs: proteins of the same class are close, others far apart."""

import csv
from itertools import combinations

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, EsmModel

checkpoint = "facebook/esm2_t6_8M_UR50D"
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = EsmModel.from_pretrained(checkpoint, add_pooling_layer=False).to(device)

with open("proteins.csv") as file:
    rows = [row for row in csv.DictReader(file) if row["split"] == "train"][:9]
pairs = list(combinations(range(len(rows)), 2))
sequences = [row["sequence"] for row in rows]
classes = torch.tensor([int(row["location"]) for row in rows])


def encode(batch):
    inputs = tokenizer(batch, return_tensors="pt", padding=True).to(device)
    cls = model(**inputs).last_hidden_state[:, 0, :]
    return F.normalize(cls, p=2, dim=1)


def contrastive_loss(a, b, same, margin=1.0):
    distance = F.pairwise_distance(a, b)
    return torch.mean(same * distance.pow(2) + (1 - same) * torch.clamp(margin - distance, min=0).pow(2))


def info_nce(embeddings, labels, temperature=0.1):
    similarity = embeddings @ embeddings.t() / temperature
    itself = torch.eye(len(labels), dtype=torch.bool, device=similarity.device)
    similarity = similarity.masked_fill(itself, float("-inf"))
    positives = (labels[:, None] == labels[None, :]) & ~itself
    log_prob = similarity - torch.logsumexp(similarity, dim=1, keepdim=True)
    log_prob = log_prob.masked_fill(~positives, 0.0)
    return -(log_prob.sum(dim=1) / positives.sum(dim=1).clamp(min=1)).mean()


optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
model.train()
for step in range(4):
    first = encode([sequences[i] for i, _ in pairs])
    second = encode([sequences[j] for _, j in pairs])
    same = torch.tensor([float(classes[i] == classes[j]) for i, j in pairs], device=device)
    loss = contrastive_loss(first, second, same) + 0.1 * info_nce(encode(sequences), classes.to(device))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.5)
    optimizer.step()
    print(step, f"{loss.item():.4f}")

model.eval()
with torch.no_grad():
    embeddings = encode(sequences)
    cosine = F.cosine_similarity(embeddings.unsqueeze(1), embeddings.unsqueeze(0), dim=-1)
    nearest = cosine.fill_diagonal_(-1).argmax(dim=1)
print("nearest", nearest.tolist(), f"{(classes[nearest.cpu()] == classes).float().mean().item():.4f}")
print(cosine[0].cpu().numpy().round(4))
