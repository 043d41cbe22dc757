"""Two processes at once with every output: one of them makes it, the other is refused in words."""

import signal

import pytest

from tests.abuse.command import FAILED, TIMEOUT, contents, done, run, start, wait_for_shard

REFUSALS = ("is being written by another process", "already exists")


def refused(code, said):
    return code == FAILED and any(words in said for words in REFUSALS) and "Traceback" not in said


@pytest.mark.long
def test_the_second_is_refused_while_the_first_is_at_work(case, inputs, whole, tmp_path):
    arguments = inputs.command(case, tmp_path)
    first = start(arguments)
    wait_for_shard(first, tmp_path)
    first.send_signal(signal.SIGSTOP)
    try:
        code, said = run(arguments)
    finally:
        first.send_signal(signal.SIGCONT)
    first_said = first.communicate(timeout=TIMEOUT)[0]
    assert refused(code, said) and REFUSALS[0] in said, said
    assert first.returncode == done(case), first_said
    assert contents(tmp_path) == whole[0]


@pytest.mark.long
def test_three_at_the_same_moment(case, inputs, whole, tmp_path):
    arguments = inputs.command(case, tmp_path)
    processes = [start(arguments) for _ in range(3)]
    ends = [(process.communicate(timeout=TIMEOUT)[0], process.returncode)[::-1] for process in processes]
    won = [code for code, _ in ends if code == done(case)]
    lost = [code for code, said in ends if refused(code, said)]
    print(f"{case}: {len(won)} done, {len(lost)} refused in words")
    # The command of a folder that is done already is done, too.
    assert won and len(won) + len(lost) == 3 and (len(won) == 1 or case == "embed folder"), ends
    assert contents(tmp_path) == whole[0]
