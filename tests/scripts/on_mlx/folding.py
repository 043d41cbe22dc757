"""Fold proteins with ESMFold, look at the confidence, and write PDB files."""

import mlx.core as mx
import numpy as np
from transformers import AutoTokenizer

from mlx_esm_hf import MLXEsmForProteinFolding

tokenizer = AutoTokenizer.from_pretrained("facebook/esmfold_v1")
model = MLXEsmForProteinFolding.from_pretrained("facebook/esmfold_v1", low_cpu_mem_usage=True)
model = model.float().eval()
model.trunk.set_chunk_size(64)

sequences = {"peptide": "MLKNVQVQLV", "villin": "LSDEDFKAVFGMTRSAFANLP"}

for name, sequence in sequences.items():
    inputs = tokenizer([sequence], return_tensors="mlx", add_special_tokens=False)["input_ids"]
    output = model(inputs)
    plddt = output["plddt"][0, :, 1]
    print(name, output["positions"].shape, f"pLDDT {plddt.mean().item():.4f} pTM {output['ptm'].item():.4f}")
    alpha_carbons = output["positions"][-1, 0, :, 1]
    print(np.array(mx.linalg.norm(alpha_carbons[:5] - alpha_carbons[0], axis=-1)).round(3))
    pdb = model.output_to_pdb(output)[0]
    with open(f"{name}.pdb", "w") as file:
        file.write(pdb)
    atoms = [line for line in pdb.splitlines() if line.startswith("ATOM")]
    print(len(atoms), "atoms")
    for line in atoms[:6]:
        print(line[:54])
