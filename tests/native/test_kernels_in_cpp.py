"""The C++ test program of the kernels, built with and without the compiler's sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "native"
COMPILER = os.environ.get("CXX") or "c++"
MAKER = next((name for name in ("ninja", "make") if shutil.which(name)), "ninja or make")

missing = [name for name in ("cmake", COMPILER, MAKER) if shutil.which(name.split()[0]) is None]
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the kernels are for Linux"),
    pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}"),
]


def run(*command: str | Path) -> str:
    """What the command says; the test fails with it where the command fails."""
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.returncode == 0, f"{' '.join(map(str, command))} returned {process.returncode}:\n{process.stdout}"
    return process.stdout


def check_kernels(folder: Path, sanitizer: str) -> None:
    run("cmake", "-S", NATIVE, "-B", folder, "-G", "Ninja" if MAKER == "ninja" else "Unix Makefiles",
        "-DMLX_ESM_MODULE=OFF", "-DMLX_ESM_TESTS=ON", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
        f"-DMLX_ESM_SANITIZE={sanitizer}")  # fmt: skip
    run("cmake", "--build", folder, "--parallel", "2")
    output = run(folder / "test_kernels")
    print(output)
    assert ", 0 failed" in output.splitlines()[-1]


def test_kernels(tmp_path):
    check_kernels(tmp_path, "")


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", ["address", "undefined", "thread"])
def test_kernels_under_a_sanitizer(tmp_path, sanitizer):
    source = tmp_path / "empty.cpp"
    source.write_text("int main() {}")
    links = [*COMPILER.split(), f"-fsanitize={sanitizer}", str(source), "-o", str(tmp_path / "empty")]
    if subprocess.run(links, capture_output=True).returncode != 0:
        pytest.skip(f"{COMPILER} has no {sanitizer} sanitizer")
    check_kernels(tmp_path / "build", sanitizer)
