"""Check an installed wheel: it contains no libmlx, its kernels load (on Linux), and they agree with plain MLX.

Run it with the Python of an environment in which the wheel and its dependencies are installed. It does not import the
repository.
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


def model_output() -> list[float]:
    """Return the last hidden state of a small random model, which has the same weights in every process."""
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
    """Exit with a message if the installed wheel is wrong."""
    if any(file.name.startswith("libmlx") for file in files("mlx-esm-hf") or ()):
        sys.exit("The wheel contains a libmlx. It must use mlx-cpu's: a second copy has its own devices and streams.")
    print(f"kernels: {kernels.STATE}")
    if sys.platform == "linux" and kernels.native is None:
        sys.exit("The kernels of the wheel do not work on this machine.")
    plain = subprocess.run(
        [sys.executable, __file__, "--output"],
        env={**os.environ, "MLX_ESM_KERNELS": "0"},
        stdout=subprocess.PIPE,
        check=True,
    )
    difference = max(abs(a - b) for a, b in zip(model_output(), json.loads(plain.stdout), strict=True))
    print(f"largest difference from plain MLX: {difference:.1e}")
    if not difference < 1e-4:
        sys.exit("The results of the kernels and of plain MLX differ by 1e-4 or more.")


if __name__ == "__main__":
    if sys.argv[1:] == ["--output"]:
        print(json.dumps(model_output()))
    else:
        check()
