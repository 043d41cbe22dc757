"""Look inside ESM-2: attention maps, states of each layer, a logit lens, and gradients of the input."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from transformers import AutoTokenizer

from mlx_esm_hf import MLXEsmForMaskedLM

checkpoint = "facebook/esm2_t6_8M_UR50D"
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = MLXEsmForMaskedLM.from_pretrained(checkpoint, attn_implementation="eager").eval()

sequence = "LSDEDFKAVFGMTRSAFANLPLWKQQNLKKEKGLF"
site = 12
inputs = tokenizer(sequence, return_tensors="mlx")

outputs = model(**inputs, output_attentions=True, output_hidden_states=True)

# Attention: entropy of each head, and the residue that each head of the last layer looks at most.
attentions = mx.stack(outputs.attentions, axis=1).squeeze(0)  # layers, heads, L, L
attentions = attentions[:, :, 1:-1, 1:-1]
attentions = attentions / attentions.sum(axis=-1, keepdims=True)
entropy = -(attentions * mx.log(attentions + 1e-9)).sum(-1).mean(-1)
for layer in range(entropy.shape[0]):
    print("entropy", layer, [round(x, 4) for x in entropy[layer].tolist()])
print("attended", attentions[-1, :, site].argmax(axis=-1).tolist())

# States: how far each layer moves the residue, and how similar neighbouring residues are.
states = mx.stack([state[0, 1:-1] for state in outputs.hidden_states])
moved = mx.linalg.norm(states[1:] - states[:-1], axis=-1).mean(axis=1)
unit = states / mx.linalg.norm(states, axis=-1, keepdims=True)
similarity = mx.einsum("lid,lid->li", unit[:, 1:], unit[:, :-1]).mean(axis=1)
print("moved", np.array(moved).round(4), "similarity", np.array(similarity).round(4))

# States of a layer, without a hook.
layer = outputs.hidden_states[2]
print("hook", np.array(layer.reshape(-1, layer.shape[-1])[site, :4]).round(4))

# Logit lens: what each layer would predict.
for depth, state in enumerate(outputs.hidden_states):
    probs = mx.softmax(model.lm_head(state)[0, site], axis=0)
    value, index = probs.max(axis=0), probs.argmax(axis=0)
    print("lens", depth, tokenizer.convert_ids_to_tokens(index.item()), f"{value.item():.4f}")

# Saliency: gradient of the log-probability of the residue, times the input.
embeddings = model.esm.embeddings.word_embeddings(inputs["input_ids"])


def log_prob(embeddings):
    logits = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    return nn.log_softmax(logits[0, site], axis=-1)[inputs["input_ids"][0, site]]


saliency = (mx.grad(log_prob)(embeddings) * embeddings).sum(axis=-1).abs()[0, 1:-1]
top = mx.argsort(-saliency)[:5]
print("saliency", [(sequence[i], i + 1) for i in top.tolist()], np.array(saliency[top]).round(4))
