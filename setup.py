"""The CPU kernels of native/; all else about the package stands in setup.cfg.

They are built on Linux with MLX's own extension mechanism. Where that fails the package is installed without them and
runs on plain MLX; `_native.json`, beside the module, keeps which MLX it was built with or why it was not.
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


def missing(compiler, headers):
    """What is missing to build the kernels, and what to install; None where nothing is.

    Args:
        compiler: of C++, as the environment variable CXX has it: a command, perhaps with options.
        headers: the folder in which Python's C headers should be.
    """
    if shutil.which(compiler.split()[0]) is None:
        return (
            f"there is no C++ compiler, {compiler!r}: install g++ 11 or newer (Debian and Ubuntu: apt install g++; "
            "Fedora: dnf install gcc-c++)"
        )
    if not Path(headers, "Python.h").exists():
        return (
            f"Python's headers are not installed, {headers} has no Python.h: install them (Debian and Ubuntu: apt "
            "install python3-dev; Fedora: dnf install python3-devel)"
        )
    return None


arguments = {}
if sys.platform == "linux":
    from mlx.extension import CMakeBuild, CMakeExtension

    class BuildKernels(CMakeBuild):
        def build_extension(self, extension):
            folder = Path(self.get_ext_fullpath(extension.name)).parent
            folder.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault("CMAKE_GENERATOR", "Ninja")
            state = {"mlx": version("mlx-cpu")}
            reason = missing(os.environ.get("CXX") or "c++", sysconfig.get_path("include"))
            if reason:
                state = {"error": f"{reason}, and then this package again"}
            else:
                # A fresh folder each time: what CMake remembers of a build in pip's isolated environment are paths that
                # vanish with it.
                with tempfile.TemporaryDirectory() as fresh:
                    self.build_temp = fresh
                    try:
                        super().build_extension(extension)
                    except (OSError, subprocess.CalledProcessError) as error:
                        state = {"error": f"{error} It needs g++ 11 or newer; `pip install -v` shows more"}
            if "error" in state:
                print(f"The CPU kernels are not built: {state['error']}", file=sys.stderr)
            (folder / "_native.json").write_text(json.dumps(state))

    kernels = CMakeExtension("mlx_esm_hf.ops._native", "native")
    kernels.optional = True
    arguments = {"ext_modules": [kernels], "cmdclass": {"build_ext": BuildKernels}}

if __name__ == "__main__":
    setup(**arguments)
