"""Settings of hypothesis, and the parity table at the end of a test session."""

from __future__ import annotations

import sys
from typing import Any

from hypothesis import settings

# No deadline for generated examples: their time depends on the machine's load.
settings.register_profile("any time", deadline=None)
settings.load_profile("any time")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    parity = sys.modules.get("tests.parity")  # imported only if parity was tested, because it imports torch
    if parity and parity.COMPARISONS:
        terminalreporter.section("parity: MLX and torch against float64")
        for line in parity.report():
            terminalreporter.write_line(line)
