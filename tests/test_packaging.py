"""Versions that appear in several files must agree. An install builds the kernels or records why it could not."""

import configparser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from mlx_esm_hf import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LINUX = {"platform_system": "Linux", "extra": ""}


@pytest.fixture(scope="module")
def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(text):
    """Return {name: requirement} of a value of setup.cfg, for Linux."""
    lines = [Requirement(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {line.name: line for line in lines if line.marker is None or line.marker.evaluate(LINUX)}


def workflow(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())


def test_kernels_are_built_with_the_installed_mlx(setup, pyproject):
    installed = requirements(setup["options.extras_require"]["cpu"])["mlx"]
    built = requirements("\n".join(pyproject["build-system"]["requires"]))["mlx"]
    assert re.fullmatch(r"==\d+(\.\d+)+", str(built.specifier)), "the build must pin one version"
    assert installed.specifier == built.specifier


def test_mlx_is_pinned_only_with_the_kernels(setup, pyproject):
    """CUDA, macOS and environments in which another package requires a newer MLX accept a range."""
    everywhere = requirements(setup["options"]["install_requires"])["mlx"]
    built = requirements("\n".join(pyproject["build-system"]["requires"]))["mlx"]
    version = str(built.specifier).removeprefix("==")
    assert version in everywhere.specifier and "0.99" in everywhere.specifier
    for extra in ("cuda12", "cuda13"):
        assert not requirements(setup["options.extras_require"][extra])["mlx"].specifier


def test_python_versions_agree(setup, pyproject):
    """Each Python of the classifiers is tested, has wheels and is in the image that builds them."""
    named = re.findall(r":: Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    assert workflow("tests.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"] == named
    tags = [f"cp{python.replace('.', '')}" for python in named]
    minors = ",".join(python.partition(".")[2] for python in named)
    assert pyproject["tool"]["cibuildwheel"]["build"].startswith(f"cp3{{{minors}}}-")
    dockerfile = (ROOT / ".github" / "manylinux" / "Dockerfile").read_text()
    copies = re.findall(r"^COPY --from=python:(\S+)-bookworm /usr/local /opt/python/(\w+)-(\w+)$", dockerfile, re.M)
    assert copies == [(python, tag, tag) for python, tag in zip(named, tags, strict=True)]


def test_oldest_python_agrees(setup, pyproject):
    oldest = min(re.findall(r":: Python :: 3\.(\d+)", setup["metadata"]["classifiers"]), key=int)
    assert setup["options"]["python_requires"] == f">=3.{oldest}"
    assert setup["mypy"]["python_version"] == f"3.{oldest}"
    assert pyproject["tool"]["ruff"]["target-version"] == f"py3{oldest}"


def test_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__


@pytest.mark.parametrize("package", ["torch", "fair-esm"])
def test_benchmarks_and_tests_require_the_same_version(setup, package):
    extras = setup["options.extras_require"]
    assert requirements(extras["benchmarks"])[package] == requirements(extras["test"])[package]


def test_wheels_are_built_in_the_image_of_the_repository(pyproject):
    settings = pyproject["tool"]["cibuildwheel"]
    images = {settings[f"manylinux-{machine}-image"] for machine in ("x86_64", "aarch64")}
    commands = [step.get("run", "") for step in workflow("wheels.yml")["jobs"]["linux"]["steps"]]
    assert len(images) == 1 and f"docker build --tag {images.pop()} .github/manylinux" in commands


def load_setup():
    """Import setup.py without running `setup()`."""
    specification = importlib.util.spec_from_file_location("package_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_missing_build_tool(tmp_path):
    missing = load_setup().missing_build_tool
    (tmp_path / "Python.h").touch()
    assert missing(f"{sys.executable} -O2", tmp_path) is None
    no_compiler = missing("missing-c++ -O2", tmp_path)
    assert "C++ compiler 'missing-c++ -O2' not found" in no_compiler and "apt install g++" in no_compiler
    no_headers = missing(sys.executable, tmp_path / "include")
    assert f"Python.h not found in {tmp_path / 'include'}" in no_headers and "apt install python3-dev" in no_headers


linux = pytest.mark.skipif(sys.platform != "linux", reason="kernels are built on Linux only")


@pytest.fixture
def checkout(tmp_path):
    """A copy of the files in git, so that `pip install` does not leave a `build/` in the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "checkout" / name)
    return tmp_path / "checkout"


def install(checkout, target, **environment):
    """Install into the folder `target`. Returns its `_native.json` and whether it contains the kernels."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, checkout]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = target / "mlx_esm_hf" / "ops"
    return json.loads((folder / "_native.json").read_text()), len(list(folder.glob("_native*.so"))) == 1


@linux
@pytest.mark.long
def test_every_install_from_a_checkout_builds_the_kernels(checkout, tmp_path, pyproject):
    version = str(requirements("\n".join(pyproject["build-system"]["requires"]))["mlx"].specifier).removeprefix("==")
    for target in (tmp_path / "first", tmp_path / "second"):
        assert install(checkout, target) == ({"mlx": version}, True)


@linux
@pytest.mark.long
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("missing-c++", "C++ compiler 'missing-c++' not found: install g++"),
        ("false", "The kernels need g++ 11 or newer"),
    ],
)
def test_install_without_kernels_records_the_reason(checkout, tmp_path, compiler, reason):
    state, kernels = install(checkout, tmp_path / "target", CXX=compiler)
    assert reason in state["error"] and not kernels
    show = "from mlx_esm_hf.ops import kernels; print(kernels.STATE)"
    shown = subprocess.run([sys.executable, "-c", show], cwd=tmp_path / "target", capture_output=True, text=True)
    assert shown.stdout.strip() == f"off: not built ({state['error']})", shown.stderr


# What a user's type checker knows: each comment names the error that it has to report there.
USER_SCRIPT = """
from typing import Any
from typing_extensions import assert_type
from mlx_esm_hf import MLXAutoModel, MLXEsmForMaskedLM, embed, load_protein_model
from mlx_esm_hf.data.proteins import Report

assert_type(MLXEsmForMaskedLM.from_pretrained("demo"), MLXEsmForMaskedLM)
model, info = MLXEsmForMaskedLM.from_pretrained("demo", output_loading_info=True)
assert_type((model, info), tuple[MLXEsmForMaskedLM, dict[str, Any]])
MLXEsmForMaskedLM.from_pretrained(8)  # call-overload
for result in embed("in.fasta", load_protein_model(MLXAutoModel, "demo"), layers=[0, -1]):
    assert_type(result.id, str)
assert_type(embed("in.fasta", "demo", "out.npz"), Report)
embed("in.fasta", 8)  # call-overload
load_protein_model(MLXAutoModel, 8)  # arg-type
"""


@pytest.mark.long
def test_user_scripts_are_checked_against_the_types_of_the_wheel(checkout, tmp_path):
    """In an environment of its own, with the wheel but without what it requires: reading that takes minutes."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    pip = [tmp_path / "fresh" / "bin" / "python", "-m", "pip", "install", "-q"]
    environment = os.environ | {"CXX": "c++-of-nowhere"}  # kernels have no types, and take a minute to build
    subprocess.run([*pip, "--no-deps", checkout], env=environment, check=True)
    subprocess.run([*pip, "mypy"], check=True)
    (tmp_path / "script.py").write_text(USER_SCRIPT)
    check = [tmp_path / "fresh" / "bin" / "mypy", "--strict", "--ignore-missing-imports", "script.py"]
    checked = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True)
    found = re.findall(r"^script.py:(\d+): error: .*\[([a-z-]+)\]$", checked.stdout, re.M)
    lines = enumerate(USER_SCRIPT.splitlines(), 1)
    assert found == [(str(n), line.partition("  # ")[2]) for n, line in lines if "  # " in line], checked.stdout
