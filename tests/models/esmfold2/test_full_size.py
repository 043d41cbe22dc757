"""The published size of ESMFold2, with random weights and a language model in 4 bits."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_esm_hf import MLXEsmFold2Config, MLXEsmFold2Model
from mlx_esm_hf.quantization.layers import QuantSpec
from tests.models.esmfold2.test_checkpoints import PUBLISHED
from tests.processes import ENVIRONMENT

SPEC = QuantSpec(64, 4)
FOLD = """
import resource, sys, time
import numpy as np
from mlx_esm_hf import MLXEsmFold2Model
begin = time.perf_counter()
model = MLXEsmFold2Model.from_pretrained(sys.argv[1])
loaded = time.perf_counter()
output = model.infer_protein("ACDEFGHIKLMNPQRSTVWY" * 5, num_diffusion_samples=1)
assert all(np.isfinite(np.array(value)).all() for value in output.values())
assert output.sample_atom_coords.shape == (1, 864, 3)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(model.num_parameters(), round(loaded - begin, 1), round(time.perf_counter() - loaded, 1), round(peak, 2))
"""


def write_checkpoint(folder: Path) -> None:
    """Write random weights; those of the language model's layers are random bits with small scales."""
    draw = np.random.default_rng(0)
    config = MLXEsmFold2Config(**copy.deepcopy(PUBLISHED) | {"folding_trunk_num_hidden_layers": 48, "num_loops": 3})
    config.structure_head.inference_num_steps, config.structure_head.noise_scale = 14, 1.003
    config.quantization = SPEC.settings()
    named: Any = tree_flatten(MLXEsmFold2Model(config).parameters())
    state = {}
    for name, array in named:
        if name.startswith("esmc.layers.") and array.ndim == 2:
            outputs, inputs = array.shape
            bits = draw.integers(0, 1 << 32, (outputs, inputs * SPEC.bits // 32), dtype=np.uint32)
            scales = mx.full((outputs, inputs // SPEC.group_size), 0.005, dtype=mx.float16)
            stem = name.removesuffix(".weight")
            state |= {name: mx.array(bits), f"{stem}.scales": scales, f"{stem}.biases": -7.5 * scales}
        else:
            state[name] = array
    config.save_pretrained(folder)
    mx.save_safetensors(str(folder / "model.safetensors"), state)


@pytest.mark.long
def test_the_published_size_folds_in_8_gb(tmp_path: Path) -> None:
    """100 residues, 3 loops, 14 steps, 1 sample. Prints the parameters, seconds of loading and folding, and peak GB."""
    begin = time.perf_counter()
    write_checkpoint(tmp_path)
    print("written in", round(time.perf_counter() - begin, 1), "s")
    command = [sys.executable, "-c", FOLD, str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    parameters, _, _, peak = done.stdout.split()[-4:]
    print(done.stdout)
    assert int(parameters) == 6_345_280_000 + 234_622_749
    assert float(peak) < 8
