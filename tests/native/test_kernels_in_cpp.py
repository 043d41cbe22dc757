"""The C++ test program of the kernels, built with and without the compiler's sanitizers, and for Arm."""

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

ARM_COMPILER = "aarch64-linux-gnu-g++"
ARM_EMULATOR = "qemu-aarch64-static"


def missing_of(*programs: str) -> list[str]:
    return [name for name in programs if shutil.which(name.split()[0]) is None]


missing = missing_of("cmake", COMPILER, MAKER)
missing_for_arm = missing_of(ARM_COMPILER, ARM_EMULATOR)
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the kernels are for Linux"),
    pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}"),
]


def run(*command: str | Path) -> str:
    """What the command says; the test fails with it where the command fails."""
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.returncode == 0, f"{' '.join(map(str, command))} returned {process.returncode}:\n{process.stdout}"
    return process.stdout


def build(folder: Path, *options: str) -> Path:
    """The test program."""
    run("cmake", "-S", NATIVE, "-B", folder, "-G", "Ninja" if MAKER == "ninja" else "Unix Makefiles",
        "-DMLX_ESM_MODULE=OFF", "-DMLX_ESM_TESTS=ON", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON", *options)  # fmt: skip
    run("cmake", "--build", folder, "--parallel", "2")
    return folder / "test_kernels"


def check(*command: str | Path) -> list[str]:
    """Run the test program and return the instruction sets that it has tested."""
    output = run(*command)
    print(output)
    assert output.endswith(", 0 failed\n")
    return [line.partition(":")[0] for line in output.splitlines() if " checks of " in line]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The test program without sanitizers."""
    return build(tmp_path_factory.mktemp("native"))


def test_kernels(program):
    check(program, "--seeds", "2")


@pytest.mark.long
def test_kernels_with_many_seeds(program):
    """The error bounds hold whatever numbers are drawn."""
    check(program, "--seeds", "100")


@pytest.mark.long
def test_faults_are_found(program):
    """The checks fail for kernels with a missing term, a dropped bias, exchanged rows, a wrong scale and the like."""
    summaries = [line for line in run(program, "--faults").splitlines() if " faults, " in line]
    assert summaries and all(line.endswith(" faults, 0 not found") for line in summaries)


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", ["address", "undefined", "thread"])
def test_kernels_under_a_sanitizer(tmp_path, sanitizer):
    source = tmp_path / "empty.cpp"
    source.write_text("int main() {}")
    links = [*COMPILER.split(), f"-fsanitize={sanitizer}", str(source), "-o", str(tmp_path / "empty")]
    if subprocess.run(links, capture_output=True).returncode != 0:
        pytest.skip(f"{COMPILER} has no {sanitizer} sanitizer")
    check(build(tmp_path / "build", f"-DMLX_ESM_SANITIZE={sanitizer}"))


@pytest.mark.long
@pytest.mark.skipif(bool(missing_for_arm), reason=f"needs {', '.join(missing_for_arm)}")
def test_kernels_on_arm(tmp_path):
    """In an emulator of a processor without a dot product of bytes, and of one that has it."""
    program = build(
        tmp_path,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={ARM_COMPILER}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    assert check(ARM_EMULATOR, "-cpu", "cortex-a53", program) == ["neon"]
    assert check(ARM_EMULATOR, "-cpu", "neoverse-n1", program) == ["neondotprod", "neon"]
