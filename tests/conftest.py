from __future__ import annotations

import sys
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    parity = sys.modules.get("tests.parity")  # imported if parity was tested; it brings torch
    if parity and parity.COMPARISONS:
        terminalreporter.section("parity: MLX and torch against float64")
        for line in parity.report():
            terminalreporter.write_line(line)
