"""A fast BLAS for MLX on Linux CPUs.

MLX's CPU wheels for Linux link netlib's reference BLAS, whose float32 matmul runs at 2 to 4 GFLOP/s where
the same two cores reach 150 with OpenBLAS; no other operation of a protein model loses as much. `bind`
redirects MLX's matmul to the OpenBLAS in `scipy-openblas32`, a wheel on PyPI: no compiler, no environment
variable.

libmlx.so calls `cblas_sgemm` through a *slot*, a word of memory in which the dynamic linker puts the
function's address. The linker takes another function only if told before MLX is loaded (LD_PRELOAD), so
`bind` does the linker's work again afterwards: it reads from the ELF file where the slots are, and from
/proc/self/maps where the file is in memory, and writes there the address of OpenBLAS's function of the same
signature.

It writes only where all is as expected: the slot is the one named `cblas_sgemm`, its page is writable
already, and it leads to the reference BLAS. Nothing is touched on macOS (Accelerate), nor if MLX was built
with another BLAS or one was preloaded. A slot is one aligned word, so a matmul in another thread takes
either function and is right. Forked processes inherit the slots, and OpenBLAS starts its threads anew in
them.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib.util
import mmap
import os
import re
import struct
import sys
import time
import warnings
from typing import NamedTuple

import mlx.core as mx

REFERENCE = "reference BLAS (netlib)"
SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")  # every CBLAS function that MLX calls
JUMP_SLOT = {62: 7, 183: 1026}  # ELF machine: relocation type, for x86-64 and aarch64


@functools.cache
def bind() -> str:
    """Give MLX's CPU matmul a fast BLAS where it lacks one; returns the name of the BLAS it now uses."""
    if sys.platform == "darwin":
        return "Accelerate"
    mlx = _mappings("libmlx.so")
    if len({mapping.path for mapping in mlx}) != 1:
        return "unknown BLAS (no libmlx.so in this process)"
    slots = _slots(mlx)
    libraries = {symbol: _library(symbol, slots.get(symbol), mlx) for symbol in SYMBOLS}
    if not is_reference(libraries["cblas_sgemm"]):
        return os.path.basename(libraries["cblas_sgemm"]) or "unknown BLAS"

    if os.environ.get("MLX_ESM_BLAS") == "0":  # the user's choice
        return REFERENCE
    if "cblas_sgemm" not in slots:
        remedy = "this build of MLX cannot be redirected to OpenBLAS, use one that links it"
    elif (openblas := _openblas()) is None:
        remedy = 'pip install "mlx-esm-hf[cpu]" adds OpenBLAS (scipy-openblas32)'
    else:
        name, functions = openblas
        for symbol, slot in slots.items():
            if is_reference(libraries[symbol]):
                slot.value = functions[symbol]
        return name

    if mx.default_device() == mx.cpu:  # a GPU's matmul does not come here
        message = f"MLX's matmul uses netlib's reference BLAS, about 100x slower than this CPU: {remedy}."
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return REFERENCE


def gemm_gflops(n: int = 2048) -> float:
    """Float32 GFLOP/s of an `n` x `n` matmul on the default device; of a smaller one if that takes long."""

    def measure(n: int) -> float:
        a = mx.ones((n, n))  # no random numbers: the caller's sequence of them is not ours to advance
        mx.eval(a)
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            mx.eval(a @ a)
            seconds.append(time.perf_counter() - start)
        return 2e-9 * n**3 / sorted(seconds[1:])[1]  # the first one warms up

    size = min(n, 256)
    gflops = measure(size)
    while size < n and 4 * 2e-9 * (2 * size) ** 3 / gflops < 1:  # seconds that the next size takes
        size = min(2 * size, n)
        gflops = measure(size)
    return gflops


class Mapping(NamedTuple):
    """A range of this process's memory that shows a file's bytes from `offset` on."""

    start: int
    end: int
    permissions: str
    offset: int
    path: str


def _mappings(name: str) -> list[Mapping]:
    """Where the files called `name` are mapped; empty where the kernel does not say."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            lines = [line.rstrip("\n").split(maxsplit=5) for line in maps if line.endswith(f"/{name}\n")]
    except OSError:
        return []
    mappings = []
    for span, permissions, offset, _, _, path in lines:
        start, end = span.split("-")
        mappings.append(Mapping(int(start, 16), int(end, 16), permissions, int(offset, 16), path))
    return mappings


def _slots(mlx: list[Mapping]) -> dict[str, ctypes.c_void_p]:
    """The slots of SYMBOLS, in memory; without those in read-only pages (a build linked with `-z now`)."""
    slots = {}
    for symbol, offset in jump_slots(mlx[0].path).items():
        for start, end, permissions, first, _ in mlx:
            if permissions == "rw-p" and first <= offset < first + end - start:
                slots[symbol] = ctypes.c_void_p.from_address(start + offset - first)
    return slots


def _library(symbol: str, slot: ctypes.c_void_p | None, mlx: list[Mapping]) -> str:
    """The path of the library in which MLX's calls of `symbol` end; empty if unknown."""
    address = slot.value if slot else None
    if not address or any(start <= address < end and "x" in mode for start, end, mode, _, _ in mlx):
        # No slot, or one that still leads to libmlx.so's own stub, which looks the symbol up when called.
        # Do so in the same order: what is global (preloaded libraries) comes first.
        for scope in (None, mlx[0].path):
            try:
                address = ctypes.cast(ctypes.CDLL(scope)[symbol], ctypes.c_void_p).value
                break
            except (AttributeError, OSError):
                continue
    info = (ctypes.c_void_p * 4)()  # a Dl_info, whose first member is the file's name
    if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), info) or not info[0]:
        return ""
    return os.path.realpath(os.fsdecode(ctypes.string_at(info[0])))


def is_reference(library: str) -> bool:
    """Whether the file is netlib's BLAS. Debian calls OpenBLAS libblas too, in a folder that tells."""
    folder, name = os.path.split(library)
    good = re.search("openblas|mkl|blis|atlas", os.path.basename(folder))
    return bool(re.match(r"libc?blas[-.]", name)) and not good


def _openblas() -> tuple[str, dict[str, int | None]] | None:
    """The name of scipy-openblas32's library and the addresses of its SYMBOLS; None if it cannot be used.

    Its Python package is found but not imported: that takes 100 ms, and shows its symbols (some of LAPACK's
    among them) to every library loaded later. ctypes never unloads a library, so the addresses stay valid.
    """
    try:
        spec = importlib.util.find_spec("scipy_openblas32")
        folder = os.path.dirname(spec.origin or "") if spec else ""
        (path,) = glob.glob(os.path.join(glob.escape(folder), "lib", "libscipy_openblas*.so"))
        # Read once, when the library is loaded. By default an idle thread spins for 2^26 cycles before it sleeps; on
        # a machine with other work that makes small matmuls wait for time slices and take several times as long.
        os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "12")
        library = ctypes.CDLL(path, ctypes.RTLD_LOCAL)
        pointers = {symbol: ctypes.cast(library[f"scipy_{symbol}"], ctypes.c_void_p) for symbol in SYMBOLS}
        get_config = library.scipy_openblas_get_config
    except (AttributeError, OSError, ValueError):
        return None
    get_config.restype = ctypes.c_char_p
    config = get_config().decode()
    name = re.match(r"OpenBLAS \d+\.\d+\.\d+", config)
    if name is None or "USE64BITINT" in config:  # MLX passes 32-bit integers
        return None
    return f"{name[0]} (scipy-openblas32)", {symbol: pointer.value for symbol, pointer in pointers.items()}


def jump_slots(path: str) -> dict[str, int]:
    """The offsets in the ELF file `path` of the slots of SYMBOLS; empty for a file of any other kind."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as elf:
            return _jump_slots(elf)
    except (IndexError, OSError, ValueError, struct.error):  # truncated, or not what it says
        return {}


class Section(NamedTuple):
    """What is needed of a section header of a 64-bit ELF file."""

    name: int
    type: int
    address: int
    offset: int
    size: int
    link: int


def _jump_slots(elf: mmap.mmap) -> dict[str, int]:
    magic, machine, headers, count, names = struct.unpack("<6s12xH20xQ12xHH", elf[:64])
    if magic != b"\x7fELF\2\1" or machine not in JUMP_SLOT:  # 64 bits, little-endian
        return {}

    def content(section: Section) -> bytes:
        return elf[section.offset : section.offset + section.size]

    def string(strings: bytes, start: int) -> str:
        return strings[start : strings.index(b"\0", start)].decode()

    table = struct.iter_unpack("<II8xQQQI20x", elf[headers : headers + 64 * count])
    sections = [Section(*fields) for fields in table]
    section_names = content(sections[names])
    slots = {}
    for relocations in sections:
        if string(section_names, relocations.name) != ".rela.plt":
            continue
        symbol_table = sections[relocations.link]
        symbols, symbol_names = content(symbol_table), content(sections[symbol_table.link])
        for address, info, _ in struct.iter_unpack("<QQq", content(relocations)):
            (start,) = struct.unpack_from("<I", symbols, 24 * (info >> 32))
            symbol = string(symbol_names, start)
            if symbol in SYMBOLS and info & 0xFFFFFFFF == JUMP_SLOT[machine]:
                for section in sections:
                    if section.type == 1 and section.address <= address < section.address + section.size:
                        slots[symbol] = section.offset + address - section.address
    return slots
