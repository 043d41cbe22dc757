"""Ranks that are killed: their run ends, and goes on."""

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
KILLS = 4  # of each case, of either rank in turn

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def on_two_ranks(arguments):
    return [*ON_TWO_RANKS, *arguments]


def pid_of(rank, folder):
    """The process that writes into a folder as this rank."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if f"MLX_RANK={rank}\0".encode() in environment and str(folder).encode() in command:
            return int(process.name)
    return None


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_a_rank_that_is_killed(case, inputs, tmp_path):
    (tmp_path / "whole").mkdir()
    code, said = run(on_two_ranks(inputs.command(case, tmp_path / "whole")))
    expected, rng, killed = contents(tmp_path / "whole"), random.Random(case), 0
    assert expected, said
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
        process.communicate(timeout=TIMEOUT)  # the launcher does not wait for the dead
        assert pid_of(0, folder) is None and pid_of(1, folder) is None
        code, said = run(arguments)
        assert contents(folder) == expected, said
    print(f"{case}: {killed} ranks killed, wrong: 0")
    assert killed > KILLS / 2
