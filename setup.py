"""Build the CPU kernels of `native/`. All other settings of the package are in setup.cfg.

The kernels are built on Linux with MLX's CMake extension. If the build fails, the package is installed without them and
runs on plain MLX. `_native.json`, next to the module, records the MLX version of the build or the reason it failed.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

from setuptools import setup


def missing_build_tool(compiler, headers):
    """Return which build tool is missing and how to install it, or None if the kernels can be built.

    Args:
        compiler: the C++ compiler in the form of the environment variable CXX: a command, optionally with options.
        headers: the folder that should contain Python's C headers.
    """
    if shutil.which(compiler.split()[0]) is None:
        return (
            f"C++ compiler {compiler!r} not found: install g++ 11 or newer (Debian and Ubuntu: apt install g++; "
            "Fedora: dnf install gcc-c++)"
        )
    if not Path(headers, "Python.h").exists():
        return (
            f"Python.h not found in {headers}: install Python's headers (Debian and Ubuntu: apt install python3-dev; "
            "Fedora: dnf install python3-devel)"
        )
    return None


arguments = {}
if sys.platform == "linux":
    from mlx.extension import CMakeBuild, CMakeExtension

    class BuildKernels(CMakeBuild):
        """Build the kernels, or record why they could not be built."""

        def build_extension(self, extension):
            """Build the extension and write `_native.json`."""
            folder = Path(self.get_ext_fullpath(extension.name)).parent
            folder.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault("CMAKE_GENERATOR", "Ninja")
            state = {"mlx": version("mlx-cpu")}
            reason = missing_build_tool(os.environ.get("CXX") or "c++", sysconfig.get_path("include"))
            if reason:
                state = {"error": f"{reason}, then reinstall mlx-esm-hf"}
            else:
                # CMake's cache would keep paths of pip's isolated build environment, which pip deletes.
                with tempfile.TemporaryDirectory() as build_folder:
                    self.build_temp = build_folder
                    try:
                        super().build_extension(extension)
                    except (OSError, subprocess.CalledProcessError) as error:
                        hint = "The kernels need g++ 11 or newer. `pip install -v` shows the output of the build"
                        state = {"error": f"{error} {hint}"}
            if "error" in state:
                print(f"The CPU kernels were not built: {state['error']}", file=sys.stderr)
            (folder / "_native.json").write_text(json.dumps(state))

    kernels = CMakeExtension("mlx_esm_hf.ops._native", "native")
    kernels.optional = True
    arguments = {"ext_modules": [kernels], "cmdclass": {"build_ext": BuildKernels}}

if __name__ == "__main__":
    setup(**arguments)
