"""Kill runs at random moments: the same command must then resume and write the files of an undisturbed run."""

import random
import signal
import time

import pytest

from tests.abuse.command import contents, is_finished, run, start

KILLS = 9  # of each case


def kill_before_file_operation(arguments, number):
    """Run the command until it kills itself before a file operation."""
    code, printed = run(arguments, env={"KILL_AT": str(number)})
    assert code == -signal.SIGKILL, printed


def kill_after(arguments, folder, seconds):
    """Kill the command some seconds after its first file, possibly during a file operation.

    Returns whether it was still running.
    """
    process = start(arguments)
    while process.poll() is None and not any(folder.iterdir()):
        time.sleep(0.005)
    time.sleep(seconds)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.long
def test_killed_runs_resume(case, inputs, undisturbed, tmp_path):
    expected, operations = undisturbed
    rng, killed, wrong = random.Random(case), 0, []
    for number in range(KILLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments = inputs.command(case, folder)
        if number % 3:
            kill_before_file_operation(arguments, rng.randint(1, operations))
            killed += 1
        else:
            killed += kill_after(arguments, folder, rng.random() / 2)
        code, printed = run(arguments)
        if not is_finished(case, code, printed) or contents(folder) != expected:
            wrong.append((number, code, printed, sorted(contents(folder))))
    print(f"{case}: {killed} kills, wrong: {len(wrong)}")
    assert not wrong, wrong[0]
    assert killed > KILLS / 2  # some runs end before the kill
