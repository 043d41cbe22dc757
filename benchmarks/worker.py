"""A worker process with one library and one model, and the class that controls it from the parent.

The worker answers requests one by one and blocks on its standard input in between, so only one of several workers
computes at a time. Output of libraries goes to standard error. This module needs only NumPy, since a peer may run in
another interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
REST = 0.05  # seconds for the threads of the previous worker to stop spinning


class NotInstalled(Exception):
    """The library is not installed in the worker's interpreter."""


class Worker:
    """A worker process. Creating it starts the process and waits until the checkpoint in `folder`, if any, is loaded.

    Raises:
        NotInstalled: the library cannot be imported.
        RuntimeError: the worker failed. The message contains its standard error.
    """

    def __init__(
        self,
        peer: str,
        folder: Path | None,
        dtype: str = "float32",
        cores: int = 0,
        environment: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ):
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(paths)}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", peer, str(folder or ""), dtype, str(cores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        self.name = peer
        try:
            self.ready = self._reply()
            if "missing" in self.ready:
                raise NotInstalled(f"not installed ({self.ready['missing']})")
        except BaseException:
            self.close()
            raise

    def ask(self, call: str, args: dict[str, Any], at_least: float = 0, keep: Path | None = None) -> dict[str, Any]:
        """Call a peer's method and return its "seconds" and the process's "peak_bytes" so far.

        Args:
            call: name of the method.
            args: its arguments.
            at_least: repeat the call until this many seconds have passed; "seconds" is then the mean.
            keep: file for the result of the first call.
        """
        time.sleep(REST)
        request = {"call": call, "args": args, "at_least": at_least, "keep": keep and str(keep)}
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the worker ended; reading the reply raises the reason
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        tail = "".join(self.errors.readlines()[-20:])
        raise RuntimeError(f"The worker of {self.name} ended with status {self.process.returncode}:\n{tail}")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def peak_bytes() -> int | None:
    """Return the peak resident memory. ru_maxrss is unsuitable: a process inherits it from its parent."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except OSError:
        return None


def answer(peer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Run a request and return the reply."""
    call, args = getattr(peer, request["call"]), request["args"]
    start = time.perf_counter()
    first = call(**args)
    calls = 1
    while (seconds := time.perf_counter() - start) < request["at_least"]:
        call(**args)
        calls += 1
    if request["keep"] and first is not None:
        np.save(request["keep"], peer.numpy(first))
    return {"seconds": seconds / calls, "peak_bytes": peak_bytes()}


def main(name: str, folder: str, dtype: str, cores: str) -> None:
    """Load a peer and answer requests from standard input until it closes."""
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)

        def say(message: dict[str, Any]) -> None:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

        if int(cores):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
        from benchmarks.peers import PEERS

        try:
            peer = PEERS[name](dtype)
        except ModuleNotFoundError as error:
            if name == "ours":
                raise
            say({"missing": error.name})
            return
        start = time.perf_counter()
        if folder:
            peer.load(folder)
        ready = {"seconds": time.perf_counter() - start, "about": peer.about()}
        if folder and hasattr(peer, "weights_bytes"):
            ready["weights_bytes"] = peer.weights_bytes()
        say(ready)
        for line in sys.stdin:
            say(answer(peer, json.loads(line)))


if __name__ == "__main__":
    main(*sys.argv[1:])
