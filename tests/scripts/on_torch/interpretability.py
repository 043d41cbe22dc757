"""Look inside ESM-2: attention maps, states of each layer, a logit lens, and gradients of the input."""

import torch
from transformers import AutoTokenizer, EsmForMaskedLM

checkpoint = "facebook/esm2_t6_8M_UR50D"
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = EsmForMaskedLM.from_pretrained(checkpoint, attn_implementation="eager").eval()

sequence = "LSDEDFKAVFGMTRSAFANLPLWKQQNLKKEKGLF"
site = 12
inputs = tokenizer(sequence, return_tensors="pt")

with torch.no_grad():
    outputs = model(**inputs, output_attentions=True, output_hidden_states=True)

# Attention: entropy of each head, and the residue that each head of the last layer looks at most.
attentions = torch.stack(outputs.attentions, dim=1).squeeze(0)  # layers, heads, L, L
attentions = attentions[:, :, 1:-1, 1:-1]
attentions = attentions / attentions.sum(dim=-1, keepdim=True)
entropy = -(attentions * torch.log(attentions + 1e-9)).sum(-1).mean(-1)
for layer in range(entropy.size(0)):
    print("entropy", layer, [round(x, 4) for x in entropy[layer].tolist()])
print("attended", attentions[-1, :, site].argmax(dim=-1).tolist())

# States: how far each layer moves the residue, and how similar neighbouring residues are.
states = torch.stack([state[0, 1:-1] for state in outputs.hidden_states])
moved = torch.norm(states[1:] - states[:-1], dim=-1).mean(dim=1)
unit = states / states.norm(dim=-1, keepdim=True)
similarity = torch.einsum("lid,lid->li", unit[:, 1:], unit[:, :-1]).mean(dim=1)
print("moved", moved.numpy().round(4), "similarity", similarity.numpy().round(4))

# States of a layer, caught by a hook.
captured = {}
hook = model.esm.encoder.layer[1].register_forward_hook(lambda module, args, output: captured.update(layer=output))
with torch.no_grad():
    model(**inputs)
hook.remove()
layer = captured["layer"][0] if isinstance(captured["layer"], tuple) else captured["layer"]
print("hook", layer.reshape(-1, layer.shape[-1])[site, :4].numpy().round(4))

# Logit lens: what each layer would predict.
with torch.no_grad():
    for depth, state in enumerate(outputs.hidden_states):
        logits = model.lm_head(state)[0, site]
        value, index = torch.max(logits.softmax(dim=0), dim=0)
        print("lens", depth, tokenizer.convert_ids_to_tokens(index.item()), f"{value.item():.4f}")

# Saliency: gradient of the log-probability of the residue, times the input.
embeddings = model.esm.embeddings.word_embeddings(inputs["input_ids"]).detach().requires_grad_(True)
logits = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
log_prob = torch.log_softmax(logits[0, site], dim=-1)[inputs["input_ids"][0, site]]
log_prob.backward()
saliency = (embeddings.grad * embeddings).sum(dim=-1).abs()[0, 1:-1]
top = torch.topk(saliency, k=5)
print("saliency", [(sequence[i], i + 1) for i in top.indices.tolist()], top.values.detach().numpy().round(4))
