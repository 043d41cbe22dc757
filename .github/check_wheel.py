"""Check an installed wheel: no libmlx in it, kernels on (on a Linux CPU), a small model that answers as without them.

Run by the Python of an environment that holds the wheel and its dependencies; the repository is not imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import files

import mlx.core as mx

from mlx_esm_hf import MLXEsmConfig, MLXEsmModel
from mlx_esm_hf.ops import kernels


def answer() -> list[float]:
    """The last hidden state of a small random model, the same in each process."""
    mx.random.seed(0)
    config = MLXEsmConfig(
        vocab_size=33,
        pad_token_id=1,
        mask_token_id=32,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        position_embedding_type="rotary",
    )
    model = MLXEsmModel(config).eval()
    return model([[0, *range(4, 24), 2]]).last_hidden_state.flatten().tolist()


def check() -> None:
    if any(file.name.startswith("libmlx") for file in files("mlx-esm-hf") or ()):
        sys.exit("The wheel holds a libmlx. It is mlx-cpu's: a second one would have devices and streams of its own.")
    print(f"kernels: {kernels.STATE}")
    if sys.platform == "linux" and kernels.native is None:
        sys.exit("The wheel has no kernels that work here.")
    plain = subprocess.run(
        [sys.executable, __file__, "--answer"],
        env={**os.environ, "MLX_ESM_KERNELS": "0"},
        stdout=subprocess.PIPE,
        check=True,
    )
    difference = max(abs(a - b) for a, b in zip(answer(), json.loads(plain.stdout), strict=True))
    print(f"largest difference to plain MLX: {difference:.1e}")
    if not difference < 1e-4:
        sys.exit("The kernels and plain MLX disagree.")


if __name__ == "__main__":
    if sys.argv[1:] == ["--answer"]:
        print(json.dumps(answer()))
    else:
        check()
