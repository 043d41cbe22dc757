"""What importing the package changes in the process, and how to turn it off."""

import os
import subprocess
import sys

import pytest

from tests.marks import needs_cpu

pytestmark = [needs_cpu, pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")]

# Blocks that glibc keeps are in its heap, which ends at sbrk(0). Blocks that it will return are mapped far above.
SHOW = """
import ctypes, os
import mlx_esm_hf
from mlx_esm_hf.runtime import blas
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
block = libc.malloc(ctypes.c_size_t(64 << 20))
print("kept" if block < libc.sbrk(0) else "returned")
print("reference" if blas.bind() == blas.REFERENCE else "fast")
print(os.environ.get("OPENBLAS_THREAD_TIMEOUT"))
"""


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({}, ["kept", "fast", "12"]),
        ({"MLX_ESM_MALLOC": "0"}, ["returned", "fast", "12"]),
        ({"MLX_ESM_BLAS": "0"}, ["kept", "reference", "None"]),
        ({"OPENBLAS_THREAD_TIMEOUT": "20"}, ["kept", "fast", "20"]),
    ],
    ids=["all on", "malloc off", "BLAS off", "timeout of the user"],
)
def test_side_effects(switches, expected):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_ESM", "OPENBLAS"))}
    script = [sys.executable, "-W", "error", "-c", SHOW]
    process = subprocess.run(script, env=environment | switches, capture_output=True, text=True)
    assert process.stdout.split("\n")[:-1] == expected, process.stderr
