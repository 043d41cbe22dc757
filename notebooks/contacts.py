# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3

# %% [markdown]
# # Contacts next to a known structure
#
# The attention maps of ESM show which residues touch in the folded protein. This notebook predicts the contacts of
# human ubiquitin, compares them with its crystal structure (PDB entry 1UBI), and draws the structure.
#
# The notebook runs offline on the model that comes with the package, which **has no contact head**: it refuses to
# predict contacts, and the pictures then show the structure alone. Set `MODEL` to a Hub repository, such as
# `facebook/esm2_t33_650M_UR50D`, to see predictions. About one in three of the top predictions of Meta's smallest ESM-2
# (8 million parameters) is right here. The stored picture `docs/images/contacts.png` comes from a fine-tuned ESM-2 of 8
# million parameters.
#
# `ubiquitin_1ubi.pdb` holds the main chain and the Cβ atoms of PDB entry 1UBI (wwPDB, public domain, CC0 1.0).
#
# Install with `pip install "mlx-esm-hf[cpu,notebooks]"` (on a Mac without `cpu`).

# %%
# %matplotlib inline
import numpy as np

from mlx_esm_hf import contacts, demo_model, plots
from mlx_esm_hf.jobs.contacts import known_contacts, precision, structure_chains, top_contacts

# %% tags=["parameters"]
MODEL = "demo"

# %%
UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
STRUCTURE = "ubiquitin_1ubi.pdb"
model = demo_model() if MODEL == "demo" else MODEL

# %% [markdown]
# ## Predict contacts
#
# A contact is a pair of residues whose Cβ atoms are closer than 8 Å. The result is a matrix of probabilities. The
# same on the command line, which also writes the picture:
#
# ```bash
# mlx-esm contacts ubiquitin.fasta --model facebook/esm2_t33_650M_UR50D --output map.npz --picture map.png \
#     --structure ubiquitin_1ubi.pdb
# ```

# %%
probabilities, top = np.zeros((len(UBIQUITIN), len(UBIQUITIN))), []
try:
    (result,) = contacts([UBIQUITIN], model)
    probabilities = result.arrays["contacts"]
    top = top_contacts(probabilities)
except ValueError as error:
    print(error)  # the bundled model has no contact head
for i, j, probability in top[:5]:
    print(f"{UBIQUITIN[i - 1]}{i:<3} {UBIQUITIN[j - 1]}{j:<3} {probability:.3f}")

# %% [markdown]
# ## Compare with the structure
#
# `known_contacts` aligns each chain of a PDB or mmCIF file with the sequence and takes the best, so the numbering of
# the file does not matter. `precision` is the fraction of the L most probable pairs that are contacts, L being the
# number of residues: all pairs at least 6 residues apart, and those 6 to 11 (short), 12 to 23 (medium) and at least
# 24 residues (long) apart.
#
# The number to beat is that of random pairs: the fraction of pairs that are contacts.

# %%
known = known_contacts(STRUCTURE, UBIQUITIN)
found = precision(probabilities, known)
found_fifth = precision(probabilities, known, 0.2)
separation = np.subtract.outer(np.arange(len(known)), np.arange(len(known)))
random = {"all": separation >= 6, "short": (separation >= 6) & (separation < 12)}
random |= {"medium": (separation >= 12) & (separation < 24), "long": separation >= 24}
print("          top L  top L/5  random pairs")
for name, chosen in random.items():
    print(f"{name:8} {found[name]:6.2f} {found_fifth[name]:8.2f} {known[chosen].mean():13.2f}")

# %%
title = f"Ubiquitin, {MODEL}: precision of the top L {found['all']:.2f}"
plots.contact_map(probabilities, known, top, title)

# %% [markdown]
# ## The structure
#
# The path of the Cα atoms, coloured by the number of predicted contacts of each residue (the sum of its
# probabilities), next to the same number counted in the structure.

# %%
(chain,) = structure_chains(STRUCTURE)
positions = np.array([residue["CA"].coord for residue in chain])
far = np.abs(separation) >= 6
predicted = (probabilities * far).sum(1)
plots.backbone(positions, predicted, "predicted contacts", title=f"1UBI, contacts predicted by {MODEL}")

# %%
plots.backbone(positions, (known * far).sum(1), "contacts", title="1UBI, contacts in the structure")
