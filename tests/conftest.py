"""Environment and seeds of the tests, settings of hypothesis, and the parity table at the end of a session."""

from __future__ import annotations

import os
import sys
import zlib
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import settings

# Without the user's login, whose token the tests would send to their loopback Hub; and without colours.
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "FORCE_COLOR"):
    os.environ.pop(name, None)
os.environ["HF_TOKEN_PATH"] = os.devnull

# Examples have no deadline, because their time depends on the machine's load. They are the same in every run;
# `--hypothesis-profile random` draws new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed MLX and torch by the name of the test, so that it draws the same numbers alone and after other tests.

    One seed for all tests would make a fresh model equal to the saved one that it is compared with.
    """
    seed = zlib.crc32(item.nodeid.encode())
    mx.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


@pytest.fixture(params=["this device", "without kernels"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as this device does, then as if the kernels were off (MLX_ESM_KERNELS=0)."""
    from mlx_esm_hf.ops import kernels  # after the environment above is set

    if request.param == "without kernels":
        monkeypatch.setattr(kernels, "native", None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    parity = sys.modules.get("tests.parity")  # imported only if parity was tested, because it imports torch
    if parity and parity.COMPARISONS:
        terminalreporter.section("parity: MLX and torch against float64")
        for line in parity.report():
            terminalreporter.write_line(line)
