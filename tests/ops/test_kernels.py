"""Loading the kernels. A module that is missing or does not work causes one warning."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_esm_hf
from mlx_esm_hf.ops import kernels
from tests.marks import needs_kernels
from tests.ops.reference import native, run_python

pytestmark = needs_kernels
every_set = pytest.mark.usefixtures("instructions")

PACKAGE = Path(mlx_esm_hf.__file__).parent
# Two models, each used twice. Without torch, which transformers would import and which takes seconds.
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
    """Copy the package, to be damaged, and return its folder `ops`."""
    shutil.copytree(PACKAGE, tmp_path / "mlx_esm_hf", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "mlx_esm_hf" / "ops"


def use(ops, **environment):
    """Return the lines that are printed, warnings included, in order."""
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


def truncated_binary(ops):
    binary(ops).write_bytes(binary(ops).read_bytes()[:10])


def wrong_numbers(ops):
    """Imitate a library with another memory layout of arrays."""
    binary(ops).unlink()
    lines = ["import mlx.core as mx", "use_threads = print", "def linear(x, weight): return mx.array([[12.0]])"]
    (ops / "_native.py").write_text("\n".join(lines))


WRONG = {
    another_mlx: ("built with mlx-cpu 0.31.0, installed is", 'pip install "mlx[cpu]==0.31.0"'),
    no_compiler: ("there is no C++ compiler", "install g++"),
    truncated_binary: ("they do not work here (ImportError", "install mlx-esm-hf again"),
    wrong_numbers: ("1 · 3 + 2 · 4 is 11, not 12.0", "install mlx-esm-hf again"),
}


@pytest.mark.parametrize("damage", WRONG, ids=lambda damage: damage.__name__)
def test_one_warning_at_the_first_model(damage, copy):
    """It gives the reason and what to do. Models work all the same."""
    damage(copy)
    reason, remedy = WRONG[damage]
    lines = use(copy)
    warned = [i for i, line in enumerate(lines) if "RuntimeWarning: The kernels for CPUs are off: " in line]
    assert len(warned) == 1 and reason in lines[warned[0]] and remedy in lines[warned[0]]
    printed = [line for line in lines if line in SHAPES]
    assert printed == SHAPES
    assert warned[0] < lines.index("made")


def test_no_warning_if_they_work_or_are_turned_off(copy):
    for environment in ({}, {"MLX_ESM_KERNELS": "0"}):
        lines = use(copy, **environment)
        assert [line for line in lines if line in SHAPES] == SHAPES
        assert not any("kernels for CPUs" in line for line in lines)


def test_switching_by_environment(monkeypatch):
    show = "from mlx_esm_hf.ops import kernels as k; print(k.native and k.native.instruction_set(), k.STATE, sep='|')"
    with ThreadPoolExecutor(2) as threads:
        off, portable = threads.map(lambda wish: run_python(show, MLX_ESM_KERNELS=wish), ["0", "portable"])
    assert off.stdout.strip() == "None|off (MLX_ESM_KERNELS=0)"
    assert portable.stdout.strip() == f"portable|portable, threads: {native.threads()}"
    monkeypatch.setenv("MLX_ESM_KERNELS", "nonsense")
    known = ", ".join(native.instruction_sets())
    with pytest.raises(ValueError, match=f"MLX_ESM_KERNELS must be 0, 1 or one of {known} .* got nonsense"):
        kernels._load()


@every_set
def test_multiply_adds():
    """The loop by which benchmarks measure the peak of the machine. Its sums converge to 1/2."""
    assert native.multiply_adds(1e7) == 0.5


@pytest.mark.parametrize(
    ("build", "state"),
    [
        (None, "not built; install mlx-esm-hf again with pip's"),
        ("{unreadable", "not built; install mlx-esm-hf again with pip's"),
        (json.dumps({"error": "no compiler"}), "not built (no compiler)"),
        (json.dumps({"mlx": "0.1"}), "built with mlx-cpu 0.1, installed is "),
    ],
)
def test_kernels_of_another_build_are_not_loaded(build, state, tmp_path, monkeypatch):
    monkeypatch.delenv("MLX_ESM_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "BUILD", tmp_path / "_native.json")
    if build is not None:
        kernels.BUILD.write_text(build)
    module, message = kernels._load()
    assert module is None and message.startswith("off: ") and state in message


SHOW_STATE = """
import numpy as np
import mlx_esm_hf
print("imported", flush=True)
from mlx_esm_hf import MLXEsmConfig, MLXEsmModel
from mlx_esm_hf.ops import kernels
config = MLXEsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, hidden_size=8, num_hidden_layers=1,
                      num_attention_heads=2, intermediate_size=8, position_embedding_type="rotary")
for _ in range(2):
    assert np.isfinite(np.array(MLXEsmModel(config)([[0, 5, 2]]).last_hidden_state)).all()
print(kernels.STATE)
"""


def without_kernels(folder: Path, **files: str) -> Path:
    """Copy the package without kernels, and write other files in their place."""
    package = Path(kernels.__file__).parents[1]
    ignored = shutil.ignore_patterns("_native*", "__pycache__")
    ops_folder = shutil.copytree(package, folder / "mlx_esm_hf", ignore=ignored) / "ops"
    for name, text in files.items():
        (ops_folder / name).write_text(text)
    return folder


@pytest.mark.skipif(sys.platform != "linux" or mx.is_available(mx.gpu), reason="needs Linux without a GPU")
def test_one_warning_without_kernels(tmp_path):
    folder = without_kernels(tmp_path)
    process = run_python(SHOW_STATE, folder, PYTHONWARNINGS="always")
    _, state = process.stdout.splitlines()
    assert state.startswith("off: not built; install mlx-esm-hf again") and "g++" in state and "python3-dev" in state
    assert (
        process.stderr.count("RuntimeWarning")
        == process.stderr.count(f"The kernels for CPUs are {state}, so embedding takes about 5 times")
        == 1
    )
    importing = run_python("import mlx_esm_hf.ops.kernels", folder, PYTHONWARNINGS="always")
    chosen = run_python(SHOW_STATE, folder, PYTHONWARNINGS="always", MLX_ESM_KERNELS="0")
    assert "kernels" not in importing.stderr + chosen.stderr and chosen.returncode == importing.returncode == 0


WRONG_NUMBERS = "import mlx.core as mx\nuse_threads = linear = lambda *arguments: mx.array(10.5)"


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("_native.so", "of another machine", "ImportError: "),
        ("_native.py", "", "AttributeError: "),
        ("_native.py", WRONG_NUMBERS, "ArithmeticError: 1 · 3 + 2 · 4 is 11, not 10.5"),
    ],
    ids=["no library", "nothing in it", "wrong numbers"],
)
def test_a_module_that_does_not_work_is_not_used(tmp_path, file, content, reason):
    """Loading the module detects this, and models work without it."""
    files = {"_native.json": kernels.BUILD.read_text(), file: content}
    process = run_python(SHOW_STATE, without_kernels(tmp_path, **files))
    assert process.returncode == 0, process.stderr
    _, state = process.stdout.splitlines()
    assert state.startswith(f"off: they do not work here ({reason}") and "install mlx-esm-hf again" in state
    assert state in process.stderr
