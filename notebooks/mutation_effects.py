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
# # Effects of mutations
#
# A protein language model predicts which residues fit at a position. A substitution that it finds improbable is
# often harmful. This notebook scans all substitutions of human ubiquitin, draws the scan as a heat map and as a
# sequence logo, and lists the substitutions with the lowest and the highest scores.
#
# Everything runs offline on the model that comes with the package. That model knows little more than which residues
# are common, so its scores say nothing about ubiquitin. Set `MODEL` to a Hub repository, such as
# `facebook/esm2_t33_650M_UR50D`, for scores to work with.
#
# Install with `pip install "mlx-esm-hf[cpu,notebooks]"` (on a Mac without `cpu`).

# %%
# %matplotlib inline
import numpy as np

from mlx_esm_hf import MLXAutoModelForMaskedLM, demo_model, load_protein_model, plots, score
from mlx_esm_hf.data.proteins import STANDARD
from mlx_esm_hf.jobs.score import scan_grid

# %% tags=["parameters"]
MODEL = "demo"

# %%
UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
model = load_protein_model(MLXAutoModelForMaskedLM, demo_model() if MODEL == "demo" else MODEL)

# %% [markdown]
# ## Score a few substitutions
#
# The score is log p(mutant) − log p(wild type) at the masked position (masked marginals). Negative means that the
# model expects the wild type. A name such as `L8A:I44A` is a double mutant.

# %%
for row in score(["L8A", "K48R", "I44A", "G76A", "L8A:I44A"], UBIQUITIN, model).rows:
    mutant, value = row.values()
    print(f"{mutant:10} {value:6.2f}")

# %% [markdown]
# ## Scan all substitutions
#
# With `None` instead of a list, `score` takes all 20 residues at each position. The same on the command line, which
# also writes the picture:
#
# ```bash
# mlx-esm score --sequence ubiquitin.fasta --model demo --output scan.csv --picture scan.png
# ```

# %%
scan = score(None, UBIQUITIN, model)
grid, wild_type, first_residue = scan_grid(scan)
plots.mutation_scan(grid, wild_type, STANDARD, first_residue, f"Human ubiquitin, masked marginals of {MODEL}")

# %% [markdown]
# ## Where does the model expect one residue only?
#
# The same numbers hold the probabilities of the 20 residues at each position. In the logo the height of a column is
# its information: log2(20) minus the entropy, in bits. At a tall column the model is sure; at a low one anything goes.

# %%
odds = np.exp(grid.T)  # [positions, 20], relative to the wild type
probabilities = odds / odds.sum(1, keepdims=True)
plots.residue_letters(probabilities, STANDARD, wild_type, first_residue, f"Human ubiquitin, {MODEL}")

# %%
entropy = np.log2(20) - plots.information(probabilities)
plots.residue_curve(entropy, "entropy (bits)", title=f"Uncertainty of {MODEL} at each masked residue")

# %% [markdown]
# ## The least and the most expected substitutions

# %%
name = scan.columns[-1]
ranked = sorted((row for row in scan.rows if row["mutant"][0] != row["mutant"][-1]), key=lambda row: row[name])
for least, most in zip(ranked[:10], ranked[:-11:-1], strict=True):
    print(f"{least['mutant']:6} {least[name]:6.2f}      {most['mutant']:6} {most[name]:6.2f}")

# %% [markdown]
# A position's mean score over all substitutions tells how much the model cares about it.

# %%
mean = grid.mean(0)
for place in np.argsort(mean)[:5]:
    print(f"{wild_type[place]}{place + first_residue:<4} mean score {mean[place]:6.2f}")
