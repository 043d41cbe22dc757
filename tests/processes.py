"""Processes that tests start."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# This checkout comes first, and then what the tests' own Python was told of.
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}

# The first line of a script that interrupts itself. A background job and `nohup` ignore SIGINT, and so would their
# children.
RESTORE_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"

# `mlx.launch`, whose script need not be beside Python.
LAUNCH = """
from importlib.metadata import entry_points
(launch,) = entry_points(group="console_scripts", name="mlx.launch")
launch.load()()
"""
ON_TWO_RANKS = [sys.executable, "-c", LAUNCH, "-n", "2", "--backend", "ring", "--"]
