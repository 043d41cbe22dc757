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
# # Migrating from transformers
#
# A script for transformers' ESM classes needs three changes: the import, the class (`MLX` in front of its name), and
# `return_tensors="mlx"`. Names of arguments, outputs, checkpoints and files stay the same. This notebook ports one
# script and compares the numbers.
#
# It runs offline on the model that comes with the package, and without torch. Where torch is installed, the last
# section compares the two libraries number by number. Set `MODEL` to a Hub repository, such as
# `facebook/esm2_t6_8M_UR50D`, to compare on a real model.
#
# Install with `pip install "mlx-esm-hf[cpu,notebooks]"` (on a Mac without `cpu`).

# %%
import importlib.util

import mlx.core as mx
import numpy as np
from transformers import AutoTokenizer

from mlx_esm_hf import MLXAutoModel, MLXEsmForMaskedLM, demo_model

# %% tags=["parameters"]
MODEL = "demo"

# %%
checkpoint = demo_model() if MODEL == "demo" else MODEL

# %% [markdown]
# ## The script for transformers
#
# Which residues fit at position 27 of human ubiquitin, a lysine?
#
# ```python
# import torch
# from transformers import AutoTokenizer, EsmForMaskedLM
#
# tokenizer = AutoTokenizer.from_pretrained(checkpoint)
# model = EsmForMaskedLM.from_pretrained(checkpoint)
#
# sequence = "MQIFVKTLTGKTITLEVEPSDTIENV<mask>AKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
# inputs = tokenizer(sequence, return_tensors="pt")
# with torch.no_grad():
#     logits = model(**inputs).logits
#
# position = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
# probabilities = torch.softmax(logits[0, position], dim=-1)
# for token in torch.argsort(-probabilities)[:5].tolist():
#     print(f"{tokenizer.decode([token])}  {probabilities[token].item():.4f}")
# ```
#
# ## The same on MLX
#
# The tokenizer is transformers' own. `no_grad` has no counterpart: MLX computes gradients only where asked.

# %%
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = MLXEsmForMaskedLM.from_pretrained(checkpoint, dtype="float32")

sequence = "MQIFVKTLTGKTITLEVEPSDTIENV<mask>AKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
inputs = tokenizer(sequence, return_tensors="mlx")
logits = model(**inputs).logits

position = (inputs["input_ids"][0] == tokenizer.mask_token_id).argmax().item()
probabilities = mx.softmax(logits[0, position], axis=-1)
for token in mx.argsort(-probabilities)[:5].tolist():
    print(f"{tokenizer.decode([token])}  {probabilities[token].item():.4f}")

# %% [markdown]
# ## Line by line
#
# | transformers | mlx-esm-hf |
# |---|---|
# | `from transformers import EsmForMaskedLM` | `from mlx_esm_hf import MLXEsmForMaskedLM` |
# | `EsmForMaskedLM.from_pretrained(checkpoint)` | `MLXEsmForMaskedLM.from_pretrained(checkpoint)` |
# | `tokenizer(…, return_tensors="pt")` | `tokenizer(…, return_tensors="mlx")` |
# | `with torch.no_grad():` | nothing |
# | `model.eval()`, the default after `from_pretrained` | the same |
# | `torch.softmax(x, dim=-1)` | `mx.softmax(x, axis=-1)` |
# | `x.numpy()` | `np.array(x)` |
#
# ## Hidden states and embeddings
#
# `output_hidden_states`, `attention_mask` and the fields of the output are those of transformers. A mean over the
# residues leaves out `<cls>`, `<eos>` and padding.

# %%
encoder = MLXAutoModel.from_pretrained(checkpoint, dtype="float32")
batch = tokenizer(["MKTAYIAKQR", "GIGAVLKVLTTGLPALISW"], padding=True, return_tensors="mlx")
output = encoder(**batch, output_hidden_states=True)
print(output.last_hidden_state.shape, len(output.hidden_states))

lengths = batch["attention_mask"].sum(axis=1).tolist()
means = [output.last_hidden_state[row, 1 : length - 1].mean(axis=0) for row, length in enumerate(lengths)]
print([mean.shape for mean in means])

# %% [markdown]
# `embed` does this for whole files, with batches of similar lengths, and writes `.h5`, `.npz` or `.parquet`; see the
# notebook on embeddings.
#
# ## Save, and load in transformers
#
# `save_pretrained` writes the files of transformers: `config.json`, `model.safetensors` and the tokenizer's. The folder
# loads in either library.
#
# ```python
# model.save_pretrained("my-model")                  # here
# EsmForMaskedLM.from_pretrained("my-model")         # in transformers
# model.push_to_hub("me/my-model")                   # or publish it
# ```
#
# ## Compare the numbers
#
# Both libraries compute in float32, in another order of operations. The difference should be about a millionth of the
# largest logit. Without torch this cell does nothing.

# %%
if importlib.util.find_spec("torch") is None:
    print("torch is not installed: nothing to compare.")
else:
    import torch
    from transformers import EsmForMaskedLM

    original = EsmForMaskedLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = original(**tokenizer(sequence, return_tensors="pt")).logits.numpy()
    difference = np.abs(np.array(logits) - expected).max()
    print(f"largest logit {np.abs(expected).max():.2f}, largest difference {difference:.1e}")
    assert difference < 1e-4 * np.abs(expected).max()
