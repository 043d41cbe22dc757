from __future__ import annotations

import sys
from typing import Any

from hypothesis import settings

# Drawn examples may take any time: how long they do depends on what else the machine does.
settings.register_profile("any time", deadline=None)
settings.load_profile("any time")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    parity = sys.modules.get("tests.parity")  # imported if parity was tested; it brings torch
    if parity and parity.COMPARISONS:
        terminalreporter.section("parity: MLX and torch against float64")
        for line in parity.report():
            terminalreporter.write_line(line)
