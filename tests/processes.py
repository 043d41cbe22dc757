"""Processes that tests start."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# This checkout comes first, then the PYTHONPATH of the tests.
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}

# The first line of a script that interrupts itself. Background jobs and `nohup` ignore SIGINT, and their children
# inherit that.
RESTORE_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"

# `mlx.launch`. Its script may not be in the same folder as Python.
LAUNCH = """
from importlib.metadata import entry_points
(launch,) = entry_points(group="console_scripts", name="mlx.launch")
launch.load()()
"""
ON_TWO_RANKS = [sys.executable, "-c", LAUNCH, "-n", "2", "--backend", "ring", "--"]
