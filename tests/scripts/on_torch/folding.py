"""Fold proteins with ESMFold, look at the confidence, and write PDB files."""

import torch
from transformers import AutoTokenizer, EsmForProteinFolding
from transformers.models.esm.openfold_utils.feats import atom14_to_atom37
from transformers.models.esm.openfold_utils.protein import Protein, to_pdb

tokenizer = AutoTokenizer.from_pretrained("facebook/esmfold_v1")
model = EsmForProteinFolding.from_pretrained("facebook/esmfold_v1", low_cpu_mem_usage=True)
if torch.cuda.is_available():
    model = model.cuda()
    model.esm = model.esm.half()
    torch.backends.cuda.matmul.allow_tf32 = True
model = model.float().eval()
model.trunk.set_chunk_size(64)

sequences = {"peptide": "MLKNVQVQLV", "villin": "LSDEDFKAVFGMTRSAFANLP"}


def convert_outputs_to_pdb(outputs):
    final_positions = atom14_to_atom37(outputs["positions"][-1], outputs)
    outputs = {name: value.detach().to("cpu").numpy() for name, value in outputs.items()}
    final_positions = final_positions.cpu().numpy()
    pdbs = []
    for i in range(outputs["aatype"].shape[0]):
        protein = Protein(
            aatype=outputs["aatype"][i],
            atom_positions=final_positions[i],
            atom_mask=outputs["atom37_atom_exists"][i],
            residue_index=outputs["residue_index"][i] + 1,
            b_factors=outputs["plddt"][i],
            chain_index=outputs["chain_index"][i] if "chain_index" in outputs else None,
        )
        pdbs.append(to_pdb(protein))
    return pdbs


for name, sequence in sequences.items():
    inputs = tokenizer([sequence], return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    with torch.no_grad():
        output = model(inputs)
    plddt = output["plddt"][0, :, 1]
    print(name, tuple(output["positions"].shape), f"pLDDT {plddt.mean().item():.4f} pTM {output['ptm'].item():.4f}")
    alpha_carbons = output["positions"][-1, 0, :, 1]
    print(torch.cdist(alpha_carbons, alpha_carbons)[0, :5].numpy().round(3))
    pdb = convert_outputs_to_pdb(output)[0]
    with open(f"{name}.pdb", "w") as file:
        file.write(pdb)
    atoms = [line for line in pdb.splitlines() if line.startswith("ATOM")]
    print(len(atoms), "atoms")
    for line in atoms[:6]:
        print(line[:54])
