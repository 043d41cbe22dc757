from __future__ import annotations

import sys
from typing import Any

from hypothesis import settings

# No time limit for examples: on a busy machine some are slow.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    parity = sys.modules.get("tests.parity")  # do not import it here: it imports torch
    if parity and parity.COMPARISONS:
        terminalreporter.section("parity: MLX and torch against float64")
        for line in parity.report():
            terminalreporter.write_line(line)
