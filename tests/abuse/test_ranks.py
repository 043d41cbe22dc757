"""Kill one of two ranks: the other one must end as well, and the same command must resume the run."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.abuse.command import TIMEOUT, contents, run, start, wait_for_shard
from tests.processes import ON_TWO_RANKS

CASES = ["embed .npz", "embed folder", "perplexity .csv"]
KILLS = 4  # of each case; the ranks take turns

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def on_two_ranks(arguments):
    return [*ON_TWO_RANKS, *arguments]


def pid_of(rank, folder):
    """Return the process id of a rank of the run that writes into a folder; None if it has ended."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
        except OSError:  # the process has ended
            continue
        if f"MLX_RANK={rank}\0".encode() in environment and str(folder).encode() in command:
            return int(process.name)
    return None


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_run_resumes_after_a_rank_was_killed(case, inputs, tmp_path):
    (tmp_path / "undisturbed").mkdir()
    code, printed = run(on_two_ranks(inputs.command(case, tmp_path / "undisturbed")))
    expected, rng, killed = contents(tmp_path / "undisturbed"), random.Random(case), 0
    assert expected, printed
    for number in range(KILLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments = on_two_ranks(inputs.command(case, folder))
        process = start(arguments)
        wait_for_shard(process, folder)
        time.sleep(rng.random() / 10)
        if pid := pid_of(number % 2, folder):
            os.kill(pid, signal.SIGKILL)
            killed += 1
        process.communicate(timeout=TIMEOUT)  # the launcher must not wait for the killed rank
        assert pid_of(0, folder) is None and pid_of(1, folder) is None
        code, printed = run(arguments)
        assert contents(folder) == expected, printed
    print(f"{case}: {killed} ranks killed, wrong: 0")
    assert killed > KILLS / 2
