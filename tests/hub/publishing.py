"""Helpers of the tests of publishing."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from huggingface_hub import ModelCard

import mlx_esm_hf
from mlx_esm_hf import MLXEsmForMaskedLM
from mlx_esm_hf.hub import publish
from tests.hub import environment

ROOT = Path(mlx_esm_hf.__file__).parents[1]


ID, TOKEN = "me/esm", "hf_me"


IDS = [[0, 20, 15, 11, 2]]


def names(folder):
    return {file.name for file in Path(folder).iterdir() if not file.name.startswith(".")}


def logits(model):
    return np.array(model(mx.array(IDS)).logits)


def push(folder, repo_id=ID, **options):
    return publish(folder, repo_id, **{"token": TOKEN} | options)


def load(repo_id=ID, **options):
    return MLXEsmForMaskedLM.from_pretrained(repo_id, **options)


ELSEWHERE = """
import json, sys
library, repo_id = sys.argv[1:]
if library == "transformers":
    from transformers import AutoModelForMaskedLM as Model
    tensors = "pt"
else:
    sys.modules["torch"] = None  # not needed, and importing it takes seconds
    from mlx_esm_hf import MLXAutoModelForMaskedLM as Model
    tensors = "mlx"
from transformers import AutoTokenizer
inputs = AutoTokenizer.from_pretrained(repo_id)("MKT", return_tensors=tensors)
print(json.dumps(Model.from_pretrained(repo_id)(**inputs).logits.tolist()))
"""


def run_elsewhere(hub, home, code, *arguments, **variables):
    """Run a script in another process with its own cache."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(hub.endpoint, home, **variables), capture_output=True, text=True
    )


def card(hub, repo_id=ID):
    return ModelCard(hub.repos[repo_id].files()["README.md"].decode())


def code_blocks(text):
    return [block.partition("```")[0] for block in text.split("```python\n")[1:]]
