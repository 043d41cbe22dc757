"""The command `mlx-esm env`."""

from __future__ import annotations

import platform
from importlib.metadata import version

from rich.console import Console
from rich.table import Table


def command() -> None:
    """Print versions, the device, the state of the CPU kernels and their threads, the BLAS in use and its speed."""
    import mlx.core as mx

    from mlx_esm_hf.ops import kernels
    from mlx_esm_hf.runtime import blas
    from mlx_esm_hf.runtime.threads import thread_limits
    from mlx_esm_hf.version import __version__

    table = Table.grid(padding=(0, 2))
    table.add_row("mlx-esm-hf", __version__)
    for package in ("mlx", "transformers", "huggingface_hub", "safetensors", "tokenizers", "numpy"):
        table.add_row(package, version(package))
    table.add_row("Python", platform.python_version())
    table.add_row("platform", platform.platform())
    table.add_row("device", str(mx.default_device()))
    table.add_row("CPU kernels", kernels.STATE)
    if kernels.native is not None:
        limits = ", ".join(f"{name} {number}" for name, number in thread_limits().items())
        table.add_row("kernel threads", f"{kernels.native.threads()} (minimum of {limits})")
    table.add_row("CPU BLAS", blas.bind())
    table.add_row("float32 matmul", f"{blas.gemm_gflops():.0f} GFLOP/s")
    Console(soft_wrap=True, highlight=False).print(table)
