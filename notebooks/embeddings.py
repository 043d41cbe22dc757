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
# ---

# %% [markdown]
# # Embeddings: a map of proteins and a classifier
#
# An embedding turns a protein of any length into one vector. This notebook embeds a hundred UniProt proteins, draws
# them as a map, and trains a small classifier on the vectors: does a protein come from a cell with a nucleus?
#
# Everything runs offline on the model that comes with the package. That model is tiny, so its map and its classifier
# show how it is done, not how good ESM is. Set `MODEL` to a Hub repository, such as `facebook/esm2_t33_650M_UR50D`,
# for answers about your proteins.
#
# Install with `pip install "mlx-esm-hf[cpu,notebooks]"` (on a Mac without `cpu`).

# %%
# %matplotlib inline
import csv
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mlx_esm_hf import demo_model, embed, plots, read_proteins
from mlx_esm_hf.data.proteins import STANDARD

# %% tags=["parameters"]
MODEL = "demo"

# %%
model = demo_model() if MODEL == "demo" else MODEL

# %% [markdown]
# ## Embed a FASTA file
#
# `embed` reads the file, batches proteins of similar length and yields one result per protein, in the order of the
# file. `arrays["mean"]` is the mean over the residues of the last hidden states. The same on the command line:
#
# ```bash
# mlx-esm embed ../examples/proteins.fasta --model demo --output embeddings.h5
# ```

# %%
fasta = Path("../examples/proteins.fasta")
results = list(embed(fasta, model))
vectors = np.stack([result.arrays["mean"] for result in results])
print(vectors.shape)

# %% [markdown]
# ## Draw a map
#
# `domains.csv` names the domain of life of each protein, read off the organism in its FASTA header. PCA finds the two
# directions in which the standardized vectors differ most.

# %%
with open("domains.csv", newline="") as file:
    domain_of = {row["id"]: row["domain"] for row in csv.DictReader(file)}
domains = np.array([domain_of[result.id.split()[0]] for result in results])

pca = PCA(2).fit(StandardScaler().fit_transform(vectors))
points = pca.transform(StandardScaler().fit_transform(vectors))
axis_names = tuple(f"PC{k} ({share:.0%} of the variance)" for k, share in enumerate(pca.explained_variance_ratio_, 1))
plots.embedding_map(points, domains, axis_names, f"100 UniProt proteins, mean embeddings of {MODEL}")

# %% [markdown]
# ## Train a classifier on the vectors
#
# A linear probe: logistic regression on frozen embeddings. Each protein is predicted by a classifier that did not see
# it (five-fold cross-validation). Viruses are left out, because they follow their hosts.
#
# The baseline matters. Amino-acid composition alone tells the domains apart to some degree, and a probe that does not
# beat it has learned nothing about order. With the bundled model expect a tie; a real ESM-2 should win.

# %%
cells = domains != "Viruses"
labels = domains[cells] == "Eukaryota"
sequences = [protein.sequence for protein in read_proteins(fasta)]
composition = np.array([[s.count(residue) / len(s) for residue in STANDARD] for s in sequences])

folds = StratifiedKFold(5, shuffle=True, random_state=0)
scores = {}
for name, features in (("embeddings", vectors), ("composition", composition)):
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    scores[name] = cross_val_predict(probe, features[cells], labels, cv=folds, method="predict_proba")[:, 1]
    print(f"{name:12} AUROC {roc_auc_score(labels, scores[name]):.2f} on {len(labels)} proteins")

# %% [markdown]
# With so few proteins the figures are uncertain: resampling the proteins shows by how much.

# %%
random = np.random.default_rng(0)
draws = [random.integers(0, len(labels), len(labels)) for _ in range(500)]
for name, predicted in scores.items():
    areas = [roc_auc_score(labels[rows], predicted[rows]) for rows in draws]
    low, high = np.percentile(areas, [2.5, 97.5])
    print(f"{name:12} 95% interval {low:.2f} to {high:.2f}")

# %% [markdown]
# ## Find neighbours
#
# The cosine of two vectors ranks proteins by similarity, without an alignment.

# %%
unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
nearest = np.argsort(-(unit @ unit[0]))[:5]
for index in nearest:
    print(f"{unit[index] @ unit[0]:.3f}  {results[index].id[:80]}")
