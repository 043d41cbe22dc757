"""Start several processes with the same output: one writes it, the others are refused with a message."""

import signal

import pytest

from tests.abuse.command import FAILED, TIMEOUT, contents, run, start, success_code, wait_for_shard

REFUSALS = ("is being written by another process", "already exists")


def is_refused(code, printed):
    return code == FAILED and any(refusal in printed for refusal in REFUSALS) and "Traceback" not in printed


@pytest.mark.long
def test_second_process_is_refused_while_the_first_one_runs(case, inputs, undisturbed, tmp_path):
    arguments = inputs.command(case, tmp_path)
    first = start(arguments)
    wait_for_shard(first, tmp_path)
    first.send_signal(signal.SIGSTOP)
    try:
        code, printed = run(arguments)
    finally:
        first.send_signal(signal.SIGCONT)
    printed_by_first = first.communicate(timeout=TIMEOUT)[0]
    assert is_refused(code, printed) and REFUSALS[0] in printed, printed
    assert first.returncode == success_code(case), printed_by_first
    assert contents(tmp_path) == undisturbed[0]


@pytest.mark.long
def test_three_processes_start_together(case, inputs, undisturbed, tmp_path):
    arguments = inputs.command(case, tmp_path)
    processes = [start(arguments) for _ in range(3)]
    ends = [(process.communicate(timeout=TIMEOUT)[0], process.returncode)[::-1] for process in processes]
    done = [code for code, _ in ends if code == success_code(case)]
    refused = [code for code, printed in ends if is_refused(code, printed)]
    print(f"{case}: {len(done)} done, {len(refused)} refused")
    # A finished folder is accepted and not computed again, so several of its processes can succeed.
    assert done and len(done) + len(refused) == 3 and (len(done) == 1 or case == "embed folder"), ends
    assert contents(tmp_path) == undisturbed[0]
