"""The CPU kernels of native/; all else about the package stands in setup.cfg.

They are built on Linux with MLX's own extension mechanism. Where that fails the package is installed without them and
runs on plain MLX; `_native.json`, beside the module, keeps which MLX it was built with or why it was not.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from setuptools import setup

arguments = {}
if sys.platform == "linux":
    from mlx.extension import CMakeBuild, CMakeExtension

    class BuildKernels(CMakeBuild):
        def build_extension(self, extension):
            folder = Path(self.get_ext_fullpath(extension.name)).parent
            folder.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault("CMAKE_GENERATOR", "Ninja")
            try:
                compiler = os.environ.get("CXX") or "c++"
                if shutil.which(compiler.split()[0]) is None:
                    raise OSError(f"there is no C++ compiler, {compiler!r}")
                super().build_extension(extension)
                state = {"mlx": version("mlx-cpu")}
            except (OSError, subprocess.CalledProcessError) as error:
                state = {"error": f"{error}; `pip install -v` shows more"}
                print(f"The CPU kernels are not built: {state['error']}", file=sys.stderr)
            (folder / "_native.json").write_text(json.dumps(state))

    kernels = CMakeExtension("mlx_esm_hf.ops._native", "native")
    kernels.optional = True
    arguments = {"ext_modules": [kernels], "cmdclass": {"build_ext": BuildKernels}}

setup(**arguments)
