"""Compare ESMFold with published structures of `facebook/esmfold_v1`.

    python examples/check_esmfold.py [CHECKPOINT] [NOTEBOOK]

The script makes two comparisons and exits with code 1 if one of them is out of tolerance:

- one atom of the eleven residues in transformers' test of the model (tests/models/esm/test_modeling_esmfold.py);
- human GNAT1 (UniProt P11488, 350 residues) as shown in Hugging Face's notebook on folding, computed on a GPU with a
  float16 stem and TF32: the CA atoms after superposition, and the mean pLDDT. The notebook is downloaded unless a file
  is given.

The checkpoint is a download of 8.4 GB, or a folder written by `conversion/fair_esmfold.py`.
"""

import io
import json
import re
import sys
import urllib.request
from pathlib import Path

import mlx.core as mx
import numpy as np
from Bio.PDB import PDBParser, Superimposer
from Bio.SeqUtils import seq1

from mlx_esm_hf import MLXEsmForProteinFolding

NOTEBOOK = "https://raw.githubusercontent.com/huggingface/notebooks/main/examples/protein_folding.ipynb"

RESIDUES = [0, 6, 4, 13, 5, 4, 16, 12, 11, 7, 2]
FIRST_ATOM = [2.5828, 0.7993, -10.9334]  # in Å, of the first of the eight structures of the structure module
ATOM_BAR = 1e-3  # Å; transformers' test allows 1e-4 for the same code on the same kind of GPU
RMSD_BAR = 0.3  # Å
PLDDT_BAR = 0.01  # of 1


def report(name: str, found: float, bar: float, unit: str) -> bool:
    """Print a deviation and return whether it is within the tolerance."""
    within = found <= bar  # False for NaN
    print(f"{name}: {found:.2g} {unit}, {'within' if within else 'OUTSIDE'} {bar:g}")
    return within


def pdb_of_notebook(text: str) -> str:
    """Return the PDB text of the first structure in a notebook. It is in the script of a viewer."""
    for cell in json.loads(text)["cells"]:
        for output in cell.get("outputs", ()):
            for shown in output.get("data", {}).values():
                if found := re.search(r'addModel\("(PARENT[^"]*)"', "".join(shown)):
                    return found[1].replace("\\n", "\n")
    sys.exit("error: no structure found in the notebook.")


def ca_atoms(pdb: str) -> list:
    """Return the CA atoms of a structure. Their B factors are pLDDT."""
    structure = PDBParser(QUIET=True).get_structure("protein", io.StringIO(pdb))
    return [atom for atom in structure.get_atoms() if atom.id == "CA"]


def main() -> None:
    """Run the checks and print the results."""
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else "facebook/esmfold_v1"
    if len(sys.argv) > 2:
        notebook = Path(sys.argv[2]).read_text(encoding="utf-8")
    else:
        with urllib.request.urlopen(NOTEBOOK) as page:
            notebook = page.read().decode()
    published = pdb_of_notebook(notebook)
    model = MLXEsmForProteinFolding.from_pretrained(checkpoint)

    if mx.default_device() != mx.cpu:  # transformers' test computes the stem in float32
        model.float()
    atom = np.array(model([RESIDUES]).positions[0, 0, 0, 0])
    passed = [report("transformers' test, first atom", float(np.abs(atom - FIRST_ATOM).max()), ATOM_BAR, "Å")]

    theirs = ca_atoms(published)
    sequence = seq1("".join(atom.get_parent().resname for atom in theirs))
    ours = ca_atoms(model.infer_pdb(sequence))
    superposition = Superimposer()
    superposition.set_atoms(theirs, ours)
    passed.append(report(f"the notebook's {len(sequence)} residues, CA-RMSD", superposition.rms, RMSD_BAR, "Å"))
    # pLDDT is from 0 to 1 in the notebook and from 0 to 100 here.
    plddt = [np.mean([atom.bfactor for atom in atoms]) for atoms in (theirs, ours)]
    passed.append(report("their mean pLDDT, difference", abs(plddt[0] - plddt[1] / 100), PLDDT_BAR, "of 1"))
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
