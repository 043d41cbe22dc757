"""mlx-esm env"""

from __future__ import annotations

import platform
from importlib.metadata import version

from rich.console import Console
from rich.table import Table


def command() -> None:
    """Print versions, the device, our kernels and their threads, the BLAS that matmul on the CPU uses, its speed."""
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
    table.add_row("kernels on the CPU", kernels.STATE)
    if kernels.native is not None:
        bounds = ", ".join(f"{name} {number}" for name, number in thread_limits().items())
        table.add_row("threads of the kernels", f"{kernels.native.threads()} (the least of: {bounds})")
    table.add_row("BLAS on the CPU", blas.bind())
    table.add_row("float32 matmul", f"{blas.gemm_gflops():.0f} GFLOP/s")
    Console(soft_wrap=True, highlight=False).print(table)
