"""MLX's matmul is redirected to OpenBLAS if it would use the reference BLAS, and only then.

A process is bound once, and importing the package does so. Tests that depend on the state before that run in a new
process, which loads only `blas.py`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_esm_hf.runtime import blas

LOAD = """
import importlib.util, os, sys, warnings
def load():
    spec = importlib.util.spec_from_file_location("blas", sys.argv[1])
    blas = sys.modules["blas"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(blas)
    return blas
def library(symbol="cblas_sgemm"):
    mlx = blas._mappings("libmlx.so")
    return blas._library(symbol, blas._slots(mlx).get(symbol), mlx)
"""


def run(code: str, **environment: str) -> str:
    """Return what `code` prints in a new process."""
    process = subprocess.run(
        [sys.executable, "-c", LOAD + code, blas.__file__],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def reference_mlx() -> None:
    """Skip the test unless MLX comes with the reference BLAS."""
    if sys.platform != "linux" or not blas.is_reference(run("blas = load(); print(library(), end='')")):
        pytest.skip("needs Linux and an MLX that links the reference BLAS (its CPU wheel)")


@pytest.fixture(scope="module")
def openblas(reference_mlx: None) -> None:
    """Skip the test unless MLX can be bound to OpenBLAS."""
    if importlib.util.find_spec("scipy_openblas32") is None:
        pytest.skip("needs scipy-openblas32")


BEFORE = {
    "bind first": "blas = load()",
    "matmul first": "import mlx.core as mx; mx.eval(mx.ones((9, 9)) @ mx.ones((9, 9))); blas = load()",
    "slots not resolved": "sys.setdlopenflags(os.RTLD_LAZY); import mlx.core; blas = load()",
}


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_matmul_is_correct_and_uses_openblas(openblas: None, before: str) -> None:
    run(f"""
{before}
import mlx.core as mx, numpy as np
assert blas.is_reference(library())
name = blas.bind()
assert name.startswith("OpenBLAS ") and name.endswith(" (scipy-openblas32)"), name
assert all("libscipy_openblas" in library(symbol) for symbol in blas.SYMBOLS)
random = np.random.default_rng(0)
for dtype in np.float32, np.float64, np.complex64:
    a, b = random.normal(size=(2, 3, 70, 70)).astype(dtype)
    if dtype == np.complex64:
        a, b = a + 1j * b, b - 2j * a
    with mx.stream(mx.cpu):
        x, y = mx.array(a, dtype=getattr(mx, dtype.__name__)), mx.array(b, dtype=getattr(mx, dtype.__name__))
        for result, expected in (x @ y, a @ b), (x @ y.swapaxes(1, 2), a @ b.swapaxes(1, 2)):
            np.testing.assert_allclose(np.array(result), expected, rtol=1e-4, atol=1e-4)
""")


def test_idempotent(openblas: None) -> None:
    run("""
blas = load()
name, slots = blas.bind(), {k: v.value for k, v in blas._slots(blas._mappings("libmlx.so")).items()}
assert blas.bind() == name
again = load()  # another copy of the module finds a good BLAS and leaves it
assert "openblas" in again.bind()
assert {k: v.value for k, v in blas._slots(blas._mappings("libmlx.so")).items()} == slots
""")


def test_matmul_goes_through_the_slot(openblas: None) -> None:
    """MLX calls the function that `bind` wrote into the slot: here one that records the call."""
    run("""
import ctypes
import mlx.core as mx
blas, calls = load(), []
@ctypes.CFUNCTYPE(None)
def sgemm():
    calls.append("cblas_sgemm")
blas._openblas = lambda: ("recorder", dict.fromkeys(blas.SYMBOLS, ctypes.cast(sgemm, ctypes.c_void_p).value))
x = mx.ones((64, 64))
mx.eval(x @ x)
assert calls == []
assert blas.bind() == "recorder"
mx.eval(x @ x)
assert calls == ["cblas_sgemm"]
""")


def test_gflops(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 n³ operations in the time of one product. On a slow clock, only products of size 256 are measured."""
    clock = itertools.count()
    monkeypatch.setattr(blas.time, "perf_counter", lambda: next(clock))
    assert blas.gemm_gflops(64) == pytest.approx(2 * 64**3 / 1e9)
    assert blas.gemm_gflops(2048) == pytest.approx(2 * 256**3 / 1e9)


def test_forked_process_inherits(openblas: None) -> None:
    run("""
blas = load()
blas.bind()
child = os.fork()
if child == 0:
    os._exit(0 if "libscipy_openblas" in library() and blas.gemm_gflops(256) > 0 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""")


WARNINGS = """
before = library()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert blas.bind() == blas.bind() == blas.REFERENCE
assert library() == before
print(*(f"{warning.category.__name__}: {warning.message}" for warning in caught), sep="\\n")
"""


def test_warns_once_without_openblas(reference_mlx: None) -> None:
    (warning,) = run("sys.modules['scipy_openblas32'] = None; blas = load()" + WARNINGS).splitlines()
    assert warning.startswith("RuntimeWarning: ")
    assert "100x slower" in warning and 'pip install "mlx-esm-hf[cpu]"' in warning


def test_warns_once_when_the_file_is_different(reference_mlx: None) -> None:
    (warning,) = run("blas = load(); blas.jump_slots = lambda path: {}" + WARNINGS).splitlines()
    assert "this build of MLX cannot be redirected" in warning


def test_no_warning_with_a_gpu(reference_mlx: None) -> None:
    gpu = "blas.mx = type('mx', (), {'cpu': 'cpu', 'default_device': lambda: 'gpu'})"
    assert not run(f"sys.modules['scipy_openblas32'] = None; blas = load(); {gpu}" + WARNINGS).strip()


def test_nothing_changes_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("called on macOS")

    for function in "_mappings", "_slots", "_library", "_openblas":
        monkeypatch.setattr(blas, function, fail)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert blas.bind.__wrapped__() == "Accelerate"


@pytest.mark.parametrize("paths", [(), ("/a/libmlx.so", "/b/libmlx.so")], ids=["none", "two"])
def test_unknown_without_exactly_one_libmlx(monkeypatch: pytest.MonkeyPatch, paths: tuple[str, ...]) -> None:
    mappings = [blas.Mapping(0, 1, "rw-p", 0, path) for path in paths]
    monkeypatch.setattr(blas, "_mappings", lambda name: mappings)
    monkeypatch.setattr(sys, "platform", "linux")
    assert blas.bind.__wrapped__() == "unknown BLAS (no libmlx.so in this process)"


def test_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_file(*args: object, **options: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", no_file)
    assert blas._mappings("libmlx.so") == []


SHIM = """
void cblas_sgemm(int o, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) { *c = 42; }
"""


@pytest.mark.parametrize("flags", ["RTLD_NOW", "RTLD_LAZY"])
def test_preloaded_blas_is_left_alone(reference_mlx: None, tmp_path: Path, flags: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    shim = tmp_path / "libmyblas.so"
    (tmp_path / "shim.c").write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", shim, tmp_path / "shim.c"], check=True)
    run(
        f"""
sys.setdlopenflags(os.{flags})
import mlx.core as mx
blas = load()
slot = blas._slots(blas._mappings("libmlx.so"))["cblas_sgemm"]
before = slot.value
assert blas.bind() == "libmyblas.so"
assert slot.value == before
assert (mx.ones((4, 4)) @ mx.ones((4, 4)))[0, 0].item() == 42
""",
        LD_PRELOAD=str(shim),
    )


def test_each_slot_is_checked_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    slots = {symbol: ctypes.c_void_p(1) for symbol in blas.SYMBOLS}
    libraries = dict.fromkeys(blas.SYMBOLS, "/x/mlx_cpu.libs/libblas-bd8a282c.so.3.10.0")
    libraries["cblas_dgemm"] = "/x/libmkl_rt.so.2"
    monkeypatch.setattr(blas, "_mappings", lambda name: [blas.Mapping(0, 1, "rw-p", 0, "/x/libmlx.so")])
    monkeypatch.setattr(blas, "_slots", lambda mlx: slots)
    monkeypatch.setattr(blas, "_library", lambda symbol, slot, mlx: libraries[symbol])
    monkeypatch.setattr(blas, "_openblas", lambda: ("OpenBLAS", dict.fromkeys(blas.SYMBOLS, 2)))
    assert blas.bind.__wrapped__() == "OpenBLAS"
    assert [slot.value for slot in slots.values()] == [2, 1, 2]


def test_only_writable_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "jump_slots", lambda path: {"cblas_sgemm": 0x1008})
    page = (ctypes.c_char * 0x1000)()
    start = ctypes.addressof(page)

    def slots(permissions: str, offset: int) -> dict[str, ctypes.c_void_p]:
        return blas._slots([blas.Mapping(start, start + 0x1000, permissions, offset, "libmlx.so")])

    assert ctypes.addressof(slots("rw-p", 0x1000)["cblas_sgemm"]) == start + 8
    assert slots("r--p", 0x1000) == slots("rw-s", 0x1000) == slots("rw-p", 0) == slots("rw-p", 0x2000) == {}


@pytest.mark.parametrize(
    ("library", "reference"),
    [
        ("/venv/mlx_cpu.libs/libblas-bd8a282c.so.3.10.0", True),
        ("/home/openblas/venv/mlx_cpu.libs/libblas-bd8a282c.so.3.10.0", True),
        ("/usr/lib/x86_64-linux-gnu/blas/libblas.so.3.11.0", True),
        ("/usr/lib/libcblas.so.3.12.0", True),
        ("/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3", False),
        ("/usr/lib/x86_64-linux-gnu/blis-openmp/libblas.so.4", False),
        ("/usr/lib/libopenblas.so.0", False),
        ("/opt/intel/libmkl_rt.so.2", False),
        ("/usr/lib/libblis.so.4", False),
        ("/usr/lib/libflexiblas.so.3", False),
        ("/venv/mlx/lib/libmlx.so", False),
        ("", False),
    ],
)
def test_is_reference(library: str, reference: bool) -> None:
    assert blas.is_reference(library) is reference


def elf_file(machine: int, jump_slot: int) -> bytes:
    """Return a shared library with three slots, at offsets 0x40, 0x48 and 0x50 (in memory 0x1000 higher).

    They belong to cblas_sgemm, to a longer name, and to cblas_dgemm with another type of relocation.
    """
    names = b"\0cblas_sgemm\0cblas_sgemm_batch\0cblas_dgemm\0.rela.plt\0"
    start = [names.index(b"\0" + name) + 1 for name in names.split(b"\0")[1:-1]]
    contents = [
        bytes(24),  # the slots
        bytes(24) + b"".join(struct.pack("<I20x", name) for name in start[:3]),
        names,
        b"".join(
            struct.pack("<QQq", 0x1040 + 8 * i, (i + 1) << 32 | (jump_slot if i < 2 else jump_slot - 1), 0)
            for i in range(3)
        ),
    ]
    headers = bytes(64)
    offset = 64
    for i, content in enumerate(contents):
        name, kind, address, link = [(0, 1, 0x1040, 0), (0, 11, 0, 3), (0, 3, 0, 0), (start[3], 4, 0, 2)][i]
        headers += struct.pack("<IIQQQQIIQQ", name, kind, 0, address, offset, len(content), link, 0, 8, 0)
        offset += len(content)
    magic = b"\x7fELF\2\1\1".ljust(16, b"\0")
    header = struct.pack("<16sHHIQQQIHHHHHH", magic, 3, machine, 1, 0, 0, offset, 0, 64, 0, 0, 64, 5, 3)
    return header + b"".join(contents) + headers


@pytest.mark.parametrize(("machine", "jump_slot"), [(62, 7), (183, 1026)], ids=["x86-64", "aarch64"])
def test_jump_slots(tmp_path: Path, machine: int, jump_slot: int) -> None:
    (tmp_path / "lib.so").write_bytes(elf_file(machine, jump_slot))
    assert blas.jump_slots(str(tmp_path / "lib.so")) == {"cblas_sgemm": 0x40}


GARBAGE = {
    "empty": b"",
    "text": b"not a library\n" * 20,
    "magic only": b"\x7fELF\2\1",
    "header only": elf_file(62, 7)[:64],
    "header of ones": b"\x7fELF\2\1".ljust(18, b"\0") + struct.pack("<H", 62) + b"\xff" * 4000,
    "another machine": elf_file(8, 7),
    "32 bits": elf_file(62, 7).replace(b"ELF\2", b"ELF\1"),
    "big-endian": elf_file(62, 7).replace(b"ELF\2\1", b"ELF\2\2"),
    "Mach-O": b"\xcf\xfa\xed\xfe" + bytes(100),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_other_files_have_no_slots(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lib.so").write_bytes(content)
    assert blas.jump_slots(str(tmp_path / "lib.so")) == {}


def test_other_paths_have_no_slots(tmp_path: Path) -> None:
    for path in tmp_path, tmp_path / "missing.so", Path(os.devnull), Path(sys.executable), Path(__file__):
        assert blas.jump_slots(str(path)) == {}


def test_damaged_files_do_not_raise(tmp_path: Path) -> None:
    content = elf_file(62, 7)
    path = tmp_path / "lib.so"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert blas.jump_slots(str(path)) == {}
    rng = random.Random(0)
    for _ in range(1000):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        path.write_bytes(damaged)
        assert set(blas.jump_slots(str(path))) <= set(blas.SYMBOLS)
