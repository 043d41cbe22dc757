"""A fast BLAS for MLX on Linux CPUs.

MLX's CPU wheels for Linux link netlib's reference BLAS, whose float32 matmul runs at 2 to 4 GFLOP/s where
OpenBLAS reaches 150 on the same two cores. No other operation of a protein model loses as much. `bind`
redirects MLX's matmul to the OpenBLAS in `scipy-openblas32`, a wheel on PyPI. This needs no compiler and no
environment variable.

libmlx.so calls `cblas_sgemm` through a *slot*, a word of memory that holds the function's address and is
filled in by the dynamic linker. The linker can only be given another function before MLX is loaded
(LD_PRELOAD), so `bind` repeats the linker's work afterwards. It reads the location of the slots from the ELF
file and the address of the file in memory from /proc/self/maps, and writes the address of OpenBLAS's function
of the same signature into each slot.

It writes only if everything is as expected: the slot is the one named `cblas_sgemm`, its page is already
writable, and it leads to the reference BLAS. Nothing is changed on macOS (Accelerate), if MLX was built with
another BLAS, or if another BLAS was preloaded. A slot is one aligned word, so a matmul in another thread calls
one function or the other, and both are correct. Forked processes inherit the slots, and OpenBLAS restarts its
threads there.
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
    """Replace the slow reference BLAS of MLX's CPU package by OpenBLAS, and return the name of the BLAS in use."""
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
        remedy = "this build of MLX cannot be redirected to OpenBLAS; use a build that links OpenBLAS"
    elif (openblas := _openblas()) is None:
        remedy = 'pip install "mlx-esm-hf[cpu]" adds OpenBLAS (scipy-openblas32)'
    else:
        name, functions = openblas
        for symbol, slot in slots.items():
            if is_reference(libraries[symbol]):
                slot.value = functions[symbol]
        return name

    if mx.default_device() == mx.cpu:  # the matmul of a GPU does not use it
        message = f"MLX's matmul uses netlib's reference BLAS, about 100x slower than this CPU: {remedy}."
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return REFERENCE


def gemm_gflops(n: int = 2048) -> float:
    """Return the GFLOP/s of a float32 matmul on the default device.

    The matrices are [n, n], or smaller if the device is so slow that `n` would take longer than a second.
    """

    def measure(n: int) -> float:
        a = mx.ones((n, n))  # not random: that would advance the random state of the caller
        mx.eval(a)
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            mx.eval(a @ a)
            seconds.append(time.perf_counter() - start)
        return 2e-9 * n**3 / sorted(seconds[1:])[1]  # the first is a warm-up

    size = min(n, 256)
    gflops = measure(size)
    while size < n and 4 * 2e-9 * (2 * size) ** 3 / gflops < 1:  # estimated seconds for the next size
        size = min(2 * size, n)
        gflops = measure(size)
    return gflops


class Mapping(NamedTuple):
    """A range of this process's memory that maps a file from byte `offset` on."""

    start: int
    end: int
    permissions: str
    offset: int
    path: str


def _mappings(name: str) -> list[Mapping]:
    """Return the mappings of files called `name`; empty if there is no /proc."""
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
    """Return the slots of SYMBOLS in memory, except those in read-only pages (a build linked with `-z now`)."""
    slots = {}
    for symbol, offset in jump_slots(mlx[0].path).items():
        for start, end, permissions, first, _ in mlx:
            if permissions == "rw-p" and first <= offset < first + end - start:
                slots[symbol] = ctypes.c_void_p.from_address(start + offset - first)
    return slots


def _library(symbol: str, slot: ctypes.c_void_p | None, mlx: list[Mapping]) -> str:
    """Return the path of the library that MLX's calls of `symbol` reach; empty if unknown."""
    address = slot.value if slot else None
    if not address or any(start <= address < end and "x" in mode for start, end, mode, _, _ in mlx):
        # There is no slot, or it still leads to the stub in libmlx.so that looks up the symbol when first called.
        # Look it up in the same order as the stub: global symbols (of preloaded libraries) come first.
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
    """Return whether the file is netlib's BLAS. Debian also calls OpenBLAS libblas, but in a folder named after it."""
    folder, name = os.path.split(library)
    good = re.search("openblas|mkl|blis|atlas", os.path.basename(folder))
    return bool(re.match(r"libc?blas[-.]", name)) and not good


def _openblas() -> tuple[str, dict[str, int | None]] | None:
    """Return the name of scipy-openblas32's library and the addresses of its SYMBOLS; None if it cannot be used.

    Its Python package is located but not imported. An import takes 100 ms and makes its symbols, some of them from
    LAPACK, visible to every library loaded later. ctypes never unloads a library, so the addresses stay valid.
    """
    try:
        spec = importlib.util.find_spec("scipy_openblas32")
        folder = os.path.dirname(spec.origin or "") if spec else ""
        (path,) = glob.glob(os.path.join(glob.escape(folder), "lib", "libscipy_openblas*.so"))
        # OpenBLAS reads this once, when it is loaded. By default an idle thread spins for 2^26 cycles before it sleeps.
        # On a busy machine, small matmuls then wait for time slices and take several times as long.
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
    """Return the offsets of the slots of SYMBOLS in the ELF file `path`; empty for any other kind of file."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as elf:
            return _jump_slots(elf)
    except (IndexError, OSError, ValueError, struct.error):  # truncated or malformed
        return {}


class Section(NamedTuple):
    """The fields used here of a section header in a 64-bit ELF file."""

    name: int
    type: int
    address: int
    offset: int
    size: int
    link: int


def _jump_slots(elf: mmap.mmap) -> dict[str, int]:
    """Return what `jump_slots` does, for an open file. Malformed files raise errors of several kinds."""
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
