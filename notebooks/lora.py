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
# # Fine-tuning with LoRA
#
# LoRA trains a small number of new parameters beside the frozen ones of the model, so that a large model can be
# adapted on one machine. This notebook trains adapters to label each residue of a protein.
#
# The labels follow a rule that we know, so we can tell whether the model learned it: a residue is *buried-like* (`b`)
# if the mean hydropathy (Kyte and Doolittle) of the 9 residues around it is above 0, else *exposed-like* (`e`). The
# rule depends on the neighbours, so the residue alone is not enough. With labels of your own, only the table changes.
#
# Everything runs offline, in about a minute, on the model that comes with the package. Set `MODEL` to a Hub repository,
# such as `facebook/esm2_t12_35M_UR50D`, for real tasks.
#
# Install with `pip install "mlx-esm-hf[cpu,notebooks]"` (on a Mac without `cpu`).

# %%
# %matplotlib inline
import csv
import json
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from Bio.SeqUtils.ProtParamData import kd as HYDROPATHY
from mlx.utils import tree_flatten
from sklearn.metrics import accuracy_score, matthews_corrcoef
from transformers import AutoTokenizer

from mlx_esm_hf import (
    MLXEsmForTokenClassification,
    demo_model,
    load_adapter,
    merge_adapters,
    plots,
    read_proteins,
)
from mlx_esm_hf.data.proteins import STANDARD
from mlx_esm_hf.training.finetune import finetune

# %% tags=["parameters"]
MODEL = "demo"

# %%
model = demo_model() if MODEL == "demo" else MODEL
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Make tables
#
# One piece of 100 residues of each protein in `examples/proteins.fasta`, and one label for each residue. Each protein
# is on one side of the split only.


# %%
def labels_of(sequence):
    """Return a label for each residue: b where the mean hydropathy of 9 residues is above 0, else e."""
    hydropathy = [HYDROPATHY[residue] for residue in sequence]
    means = [np.mean(hydropathy[max(0, place - 4) : place + 5]) for place in range(len(sequence))]
    return "".join("b" if mean > 0 else "e" for mean in means)


proteins = [protein.sequence for protein in read_proteins("../examples/proteins.fasta")]
pieces = [sequence[:100] for sequence in proteins if len(sequence) >= 100 and set(sequence[:100]) <= set(STANDARD)]
pieces = [pieces[k] for k in np.random.default_rng(0).permutation(len(pieces))]
data = {"train": pieces[:56], "validation": pieces[56:68], "test": pieces[68:]}
for name, sequences in data.items():
    with open(folder / f"{name}.csv", "w", newline="") as file:
        csv.writer(file).writerows([("sequence", "label"), *((s, labels_of(s)) for s in sequences)])
    share = "".join(map(labels_of, sequences)).count("b") / (100 * len(sequences))
    print(f"{name:10} {len(sequences)} pieces, {share:.0%} of the residues buried-like")

# %% [markdown]
# ## Train
#
# `finetune` adds adapters of rank 8 to the projections to query, key and value and trains them together with the
# classifier. The same on the command line:
#
# ```bash
# mlx-esm finetune train.csv --task residues --validation validation.csv --model demo --output adapter --epochs 8
# ```

# %%
measured = finetune(
    folder / "train.csv",
    folder / "adapter",
    model,
    task="residues",
    validation=folder / "validation.csv",
    train="lora",
    rank=8,
    num_train_epochs=8,
    per_device_train_batch_size=8,
    learning_rate=3e-3,
    warmup_steps=0.1,
    logging_steps=4,
    save_strategy="no",
    disable_tqdm=True,
)
for name, value in measured.items():
    print(f"{name:30} {value:.3f}")

# %%
log = [json.loads(line) for line in (folder / "adapter" / "log.jsonl").read_text().splitlines()]
plots.loss_curves(log, f"LoRA, rank 8, on {MODEL}")

# %% [markdown]
# The folder holds the adapter in PEFT's files. It is small: the base model is not in it.

# %%
for path in sorted((folder / "adapter").glob("adapter_*")):
    print(f"{path.name:30} {path.stat().st_size / 1024:8.1f} KiB")

# %% [markdown]
# ## Use the adapter
#
# Load the base model, give it the adapter, and merge: the result is an ordinary model, as fast as before.

# %%
tokenizer = AutoTokenizer.from_pretrained(model)
classifier = MLXEsmForTokenClassification.from_pretrained(model, num_labels=2)
classifier = load_adapter(classifier, folder / "adapter")
trained = sum(value.size for _, value in tree_flatten(classifier.trainable_parameters()))
everything = sum(value.size for _, value in tree_flatten(classifier.parameters()))
print(f"{trained:,} of {everything:,} parameters were trained")
classifier = merge_adapters(classifier)

inputs = tokenizer(data["test"], return_tensors="mlx")
probabilities = np.array(mx.softmax(classifier(**inputs).logits, axis=-1))[:, 1:-1, 0]  # of b, without <cls> and <eos>

# %% [markdown]
# ## Compare with a baseline
#
# The best that can be done with the residue alone: give each kind of residue the label that it has most often in the
# training data. A model beats it only by looking at the neighbours.

# %%
truth = np.array([list(labels_of(sequence)) for sequence in data["test"]]) == "b"
letters = np.array(list("".join(data["train"])))
buried = np.array(list("".join(map(labels_of, data["train"])))) == "b"
usual = {residue: buried[letters == residue].mean() > 0.5 for residue in STANDARD}
baseline = np.array([[usual[residue] for residue in sequence] for sequence in data["test"]])
for name, predicted in (("LoRA", probabilities > 0.5), ("residue alone", baseline)):
    accuracy = accuracy_score(truth.ravel(), predicted.ravel())
    print(f"{name:14} accuracy {accuracy:.2f}, MCC {matthews_corrcoef(truth.ravel(), predicted.ravel()):.2f}")

# %%
title = "A test protein (shaded: buried-like by the rule)"
plots.residue_curve(probabilities[0], "probability of b", title=title, marked=truth[0])
