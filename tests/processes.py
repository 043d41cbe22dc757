"""Processes that tests start."""

import json
import os
import socket
import subprocess
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


def start_ranks(*commands, folder, **options):
    """Start a process for each rank, which find each other as under `mlx.launch` (without its launcher).

    Args:
        commands: the command of each rank.
        folder: a folder for the file with their addresses.
        options: arguments of `subprocess.Popen`.
    """
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in commands]
    addresses = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    for one in sockets:
        one.close()
    hosts = Path(folder) / "hosts.json"
    hosts.write_text(json.dumps(addresses))
    return [
        subprocess.Popen(
            [str(part) for part in command],
            env=ENVIRONMENT | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for rank, command in enumerate(commands)
    ]


# The command line, without torch, which transformers imports where it is installed.
MAIN = [
    sys.executable,
    "-c",
    "import sys; sys.modules['torch'] = None; from mlx_esm_hf.__main__ import main; main()",
]

# The command of a rank that ends as soon as all ranks are connected.
LOST_RANK = [sys.executable, "-c", "import mlx.core as mx; mx.distributed.init()"]
