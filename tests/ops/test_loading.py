"""Loading the kernels' module: one that does not work, or is not there, is noticed and told once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_esm_hf
from tests.marks import needs_kernels

pytestmark = needs_kernels

PACKAGE = Path(mlx_esm_hf.__file__).parent
# Two models, each used twice; without torch, which transformers would import, and that takes seconds each time.
USE = """
import sys
sys.modules["torch"] = None
from mlx_esm_hf import MLXEsmConfig, MLXEsmModel
from mlx_esm_hf.ops import kernels
assert kernels.__file__.startswith(__import__("os").getcwd()), kernels.__file__
config = MLXEsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, hidden_size=8, num_hidden_layers=1,
                      num_attention_heads=2, intermediate_size=8, position_embedding_type="rotary")
print(kernels.STATE, flush=True)
for _ in range(2):
    model = MLXEsmModel(config)
    print("made", flush=True)
    for _ in range(2):
        print(model([[0, 5, 2]]).last_hidden_state.shape, flush=True)
"""
SHAPES = ["made", "(1, 3, 8)", "(1, 3, 8)"] * 2


@pytest.fixture
def copy(tmp_path):
    """A copy of the package to damage: its folder of operations."""
    shutil.copytree(PACKAGE, tmp_path / "mlx_esm_hf", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "mlx_esm_hf" / "ops"


def use(ops, **environment):
    """What is printed, and what is warned of: each in the order in which it came."""
    script = [sys.executable, "-c", USE]
    variables = {"PATH": "", "PYTHONPATH": "", **environment}
    done = subprocess.run(script, cwd=ops.parents[1], env=variables, stdout=-1, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def binary(ops):
    (found,) = ops.glob("_native*.so")
    return found


def another_mlx(ops):
    (ops / "_native.json").write_text(json.dumps({"mlx": "0.31.0"}))


def no_compiler(ops):
    (ops / "_native.json").write_text(json.dumps({"error": "there is no C++ compiler: install g++"}))


def cut_binary(ops):
    binary(ops).write_bytes(binary(ops).read_bytes()[:10])


def wrong_numbers(ops):
    """As of a library whose arrays are laid out otherwise."""
    binary(ops).unlink()
    lines = ["import mlx.core as mx", "use_threads = print", "def linear(x, weight): return mx.array([[12.0]])"]
    (ops / "_native.py").write_text("\n".join(lines))


WRONG = {
    another_mlx: ("built with mlx-cpu 0.31.0, installed is", 'pip install "mlx[cpu]==0.31.0"'),
    no_compiler: ("there is no C++ compiler", "install g++"),
    cut_binary: ("they do not work here (ImportError", "install mlx-esm-hf again"),
    wrong_numbers: ("1 · 3 + 2 · 4 is 11, not 12.0", "install mlx-esm-hf again"),
}


@pytest.mark.parametrize("damage", WRONG, ids=lambda damage: damage.__name__)
def test_what_is_wrong_is_told_once_at_the_first_model(damage, copy):
    """With the reason and the cure; and the answers come all the same."""
    damage(copy)
    reason, cure = WRONG[damage]
    lines = use(copy)
    told = [i for i, line in enumerate(lines) if "RuntimeWarning: The kernels for CPUs are off: " in line]
    assert len(told) == 1 and reason in lines[told[0]] and cure in lines[told[0]]
    printed = [line for line in lines if line in SHAPES]
    assert printed == SHAPES
    assert told[0] < lines.index("made")


def test_nothing_is_told_where_they_work_or_are_turned_off(copy):
    for environment in ({}, {"MLX_ESM_KERNELS": "0"}):
        lines = use(copy, **environment)
        assert [line for line in lines if line in SHAPES] == SHAPES
        assert not any("kernels for CPUs" in line for line in lines)
