"""Get the common tests of transformers: from its source distribution, which the wheel's version names.

The tests are read where pip puts them and are never part of this repository. Files that the distribution leaves out
(other mixins, the list of common config fields) are replaced by the few names that the tests import.
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging as transformers_logging

import mlx_esm_hf
from tests.common.adapter import Adapter, CheckpointedPart, adapter_of

VARIABLE = "MLX_ESM_TRANSFORMERS_SDIST"
PACKAGE = "transformers_tests"
FILES = ("test_modeling_common.py", "test_configuration_common.py")


def download(folder: Path) -> Path:
    """Return the source distribution of the installed transformers; skip the test if pip cannot get it."""
    if path := os.environ.get(VARIABLE):
        return Path(path)
    name = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", name, "--no-binary", "transformers", "--no-deps"]
    # Building the metadata needs no package but setuptools, and the download ends before it does.
    done = subprocess.run([*command, "--no-build-isolation", "-d", folder], capture_output=True, text=True, timeout=600)
    found = sorted(folder.glob("transformers-*.tar.gz"))
    if not found:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        pytest.skip(f"pip could not download the source of {name} ({reason[0]}); set {VARIABLE} to its path")
    return found[0]


def unpack(archive: Path, folder: Path) -> None:
    """Write the two test files to a package in `folder`."""
    package = folder / PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if parts[1:2] == ("tests",) and parts[2:] and parts[2] in FILES and len(parts) == 3:
                (package / parts[2]).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    missing = [name for name in FILES if not (package / name).exists()]
    assert not missing, f"{archive} lacks {missing}"


def load(archive: Path, folder: Path) -> tuple[Any, Any]:
    """Return the modules `test_modeling_common` and `test_configuration_common`, which use our classes."""
    unpack(archive, folder)
    sys.path.insert(0, str(folder))
    add_module(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    add_module(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    add_module(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs=common_fields())
    add_module("parameterized", parameterized=Parameterized)
    with mock.patch("pytest.mark", NoMarks()):
        modeling = importlib.import_module(f"{PACKAGE}.test_modeling_common")
        configuration = importlib.import_module(f"{PACKAGE}.test_configuration_common")
    use_ours(modeling)
    return modeling, configuration


def add_module(name: str, **names: Any) -> None:
    """Make a module importable, with its parent."""
    parent = name.rpartition(".")[0]
    if parent and parent != PACKAGE:
        sys.modules.setdefault(parent, types.ModuleType(parent)).__path__ = []
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(names)


class NoMarks:
    """Marks that change nothing: pytest refuses those of transformers, and unittest does not read them."""

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        return lambda test: test


class Parameterized:
    """The part of the package "parameterized" that the tests use: one method for each row of arguments."""

    @staticmethod
    def expand(rows: Any) -> Callable[[Callable[..., None]], None]:
        namespace = sys._getframe(1).f_locals

        def add(function: Callable[..., None]) -> None:
            for number, row in enumerate(rows):
                arguments = row if isinstance(row, tuple) else (row,)
                name = f"{function.__name__}_{number}_{arguments[0]}"
                namespace[name] = with_arguments(function, name, arguments)

        return add


def with_arguments(function: Callable[..., None], name: str, arguments: tuple[Any, ...]) -> Callable[[Any], None]:
    def test(self: Any) -> None:
        function(self, *arguments)

    test.__name__ = test.__qualname__ = name
    return test


def common_fields() -> dict[str, Any]:
    """Return a value other than the default for each field that all configs have."""
    return {
        "return_dict": False,
        "output_hidden_states": True,
        "output_attentions": True,
        "dtype": "float16",
        "chunk_size_feed_forward": 5,
        "architectures": ["AModel"],
        "id2label": {0: "first", 1: "second", 2: "third"},
        "label2id": {"first": 0, "second": 1, "third": 2},
        "problem_type": "regression",
    }


# Our names in place of transformers'


class Ours:
    """An Auto class that returns adapters."""

    def __init__(self, auto: Any):
        self.auto = auto

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Adapter:
        return adapted(self.auto.from_pretrained(*args, **kwargs))


def adapted(model: Any) -> Adapter:
    adapter_of(type(model))
    return Adapter.around(model)


class TranslatedLogger(CaptureLogger):
    """Capture our log messages, with transformers' word for a parameter of another shape."""

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.out = self.out.replace("MISMATCH", "Reinit due to size mismatch")


def set_seed(seed: int) -> None:
    mlx_esm_hf.set_seed(seed)
    torch.manual_seed(seed)


def our_logger(name: str) -> logging.Logger:
    if name == "transformers.modeling_utils":
        return logging.getLogger("mlx_esm_hf.loading")
    return transformers_logging.get_logger(name)


def use_ours(modeling: Any) -> None:
    """Replace what a script replaces that is ported by the migration guide."""
    modeling.AutoModel = Ours(mlx_esm_hf.MLXAutoModel)
    modeling.AutoModelForSequenceClassification = Ours(mlx_esm_hf.MLXAutoModelForSequenceClassification)
    modeling.PreTrainedModel = Adapter
    modeling.GradientCheckpointingLayer = CheckpointedPart
    modeling.set_seed = set_seed
    modeling.CaptureLogger = TranslatedLogger
    modeling.logging = types.SimpleNamespace(**{**vars(transformers_logging), "get_logger": our_logger})
