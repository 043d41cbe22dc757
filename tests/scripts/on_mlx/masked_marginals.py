"""Score mutations by masked marginals: log p(mutant) - log p(wild type) at the masked position."""

import mlx.core as mx
import mlx.nn as nn
from transformers import AutoTokenizer

from mlx_esm_hf import MLXAutoModelForMaskedLM

model_name = "facebook/esm2_t6_8M_UR50D"
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = MLXAutoModelForMaskedLM.from_pretrained(model_name)
model = model.eval()

wild_type = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
mutations = ["M1A", "K6W", "T9P", "L43A", "I44A", "K48R", "K48R:K63R", "G76V"]

input_ids = tokenizer.encode(wild_type, return_tensors="mlx")


def log_probabilities(positions):
    masked = mx.tile(input_ids, (len(positions), 1))
    for row, position in enumerate(positions):
        masked[row, position] = tokenizer.mask_token_id
    logits = model(masked).logits
    rows = mx.arange(len(positions))
    return nn.log_softmax(logits[rows, mx.array(positions)], axis=-1)


for mutation in mutations:
    score = 0.0
    for part in mutation.split(":"):
        before, position, after = part[0], int(part[1:-1]), part[-1]
        assert wild_type[position - 1] == before
        log_probs = log_probabilities([position])[0]
        ids = tokenizer.convert_tokens_to_ids([before, after])
        score += (log_probs[ids[1]] - log_probs[ids[0]]).item()
    print(f"{mutation}\t{score:.4f}")

# All single substitutions as a matrix of [20, L], in batches of positions.
amino_acids = list("ACDEFGHIKLMNPQRSTVWY")
columns = mx.array(tokenizer.convert_tokens_to_ids(amino_acids))
positions = mx.arange(1, len(wild_type) + 1)
chunks = [log_probabilities(chunk.tolist()) for chunk in mx.split(positions, range(16, len(positions), 16))]
log_probs = mx.concatenate(chunks, axis=0)
wild = mx.take_along_axis(log_probs, input_ids[0, 1:-1][:, None], axis=1)
heatmap = (log_probs[:, columns] - wild).T
best = mx.argsort(-heatmap.flatten())[:5]
for value, index in zip(heatmap.flatten()[best], best):
    residue, position = divmod(index.item(), heatmap.shape[1])
    print(f"{wild_type[position]}{position + 1}{amino_acids[residue]}\t{value.item():.4f}")
print("mean", round(heatmap.mean().item(), 4), "lowest", round(heatmap.min().item(), 4), heatmap.shape)
