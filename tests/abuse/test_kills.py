"""A hundred kills at random moments: the same command then ends with what a run gives that nobody disturbs."""

import random
import signal
import time

import pytest

from tests.abuse.command import contents, has_ended, run, start

KILLS = 9  # of each case


def kill_before_file_operation(arguments, number):
    """Lets the command kill itself there: between any two changes of files."""
    code, said = run(arguments, env={"KILL_AT": str(number)})
    assert code == -signal.SIGKILL, said


def kill_after(arguments, folder, seconds):
    """Kills the command so many seconds after its first file: within a change of files, too."""
    process = start(arguments)
    while process.poll() is None and not any(folder.iterdir()):
        time.sleep(0.005)
    time.sleep(seconds)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.long
def test_kills_leave_no_trace(case, inputs, whole, tmp_path):
    expected, operations = whole
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
        code, said = run(arguments)
        if not has_ended(case, code, said) or contents(folder) != expected:
            wrong.append((number, code, said, sorted(contents(folder))))
    print(f"{case}: {killed} kills, wrong: {len(wrong)}")
    assert not wrong, wrong[0]
    assert killed > KILLS / 2  # the others had ended by then
