"""Predict the contacts of a protein and the precision of its best ones."""

import torch
from transformers import AutoTokenizer, EsmForMaskedLM

tokenizer = AutoTokenizer.from_pretrained("facebook/esm2_t6_8M_UR50D")
model = EsmForMaskedLM.from_pretrained("facebook/esm2_t6_8M_UR50D", attn_implementation="eager")
model.eval()

sequences = {
    "crambin": "TTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN",
    "villin headpiece": "LSDEDFKAVFGMTRSAFANLPLWKQQNLKKEKGLF",
}
batch = tokenizer(list(sequences.values()), return_tensors="pt", padding=True)
with torch.no_grad():
    contacts = model.predict_contacts(batch["input_ids"], batch["attention_mask"])
print(tuple(contacts.shape))

for i, (name, sequence) in enumerate(sequences.items()):
    L = len(sequence)
    contact_map = contacts[i, :L, :L]
    assert torch.allclose(contact_map, contact_map.transpose(0, 1), atol=1e-5)
    rows, columns = torch.triu_indices(L, L, offset=6)
    values = contact_map[rows, columns]
    order = torch.argsort(values, descending=True)[: L // 5]
    print(name, f"mean {values.mean():.4f} std {values.std():.4f}")
    for a, b, value in zip(rows[order].tolist(), columns[order].tolist(), values[order].tolist()):
        print(f"  {sequence[a]}{a + 1} {sequence[b]}{b + 1} {value:.4f}")
    threshold = torch.quantile(values, 0.9)
    close = torch.nonzero(contact_map > threshold)
    print(f"  {len(close)} pairs above {threshold.item():.4f}, {(values > threshold).sum().item()} far apart")
