"""Predict the contacts of a protein and the precision of its best ones."""

import mlx.core as mx
import numpy as np
from transformers import AutoTokenizer

from mlx_esm_hf import MLXEsmForMaskedLM

tokenizer = AutoTokenizer.from_pretrained("facebook/esm2_t6_8M_UR50D")
model = MLXEsmForMaskedLM.from_pretrained("facebook/esm2_t6_8M_UR50D", attn_implementation="eager")
model.eval()

sequences = {
    "crambin": "TTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN",
    "villin headpiece": "LSDEDFKAVFGMTRSAFANLPLWKQQNLKKEKGLF",
}
batch = tokenizer(list(sequences.values()), return_tensors="mlx", padding=True)
contacts = model.predict_contacts(batch["input_ids"], batch["attention_mask"])
print(contacts.shape)

for i, (name, sequence) in enumerate(sequences.items()):
    L = len(sequence)
    contact_map = contacts[i, :L, :L]
    assert mx.allclose(contact_map, contact_map.swapaxes(0, 1), atol=1e-5)
    rows, columns = map(mx.array, np.triu_indices(L, k=6))
    values = contact_map[rows, columns]
    order = mx.argsort(-values)[: L // 5]
    print(name, f"mean {values.mean():.4f} std {values.std(ddof=1):.4f}")
    for a, b, value in zip(rows[order].tolist(), columns[order].tolist(), values[order].tolist()):
        print(f"  {sequence[a]}{a + 1} {sequence[b]}{b + 1} {value:.4f}")
    threshold = np.quantile(values, 0.9)
    close = np.argwhere(contact_map > threshold)
    print(f"  {len(close)} pairs above {threshold.item():.4f}, {(values > threshold).sum().item()} far apart")
