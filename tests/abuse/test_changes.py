"""Change the input while a run reads it: the results must not mix the old input and the new."""

import os
import random
import signal

import pytest

from tests.abuse.command import FAILED, RESIDUES, TIMEOUT, contents, is_finished, run, start, wait_for_shard

CASES = ["embed .npz", "embed folder", "fill-mask .csv"]


def append(path):
    with open(path, "a") as file:
        file.write(">more\nMKTAYIAK\n")


def cut(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def rewrite(path):
    """Change residues in place, but no id and no length."""
    path.write_text(path.read_text().replace("A", "W"))


def replace(path):
    other = path.with_suffix(".other")
    other.write_text(path.read_text().replace("A", "W"))
    os.replace(other, path)


CHANGES = [append, cut, rewrite, replace, os.remove]


@pytest.fixture(scope="module")
def fasta(inputs):
    """A file too large for one read."""
    rng, path = random.Random(0), inputs.fasta.with_name("many.fasta")
    sequences = ["".join(rng.choices(RESIDUES, k=100)) + "<mask>" for _ in range(400)]
    path.write_text("".join(f">p{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
    return path


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_input_changes_during_a_run(case, fasta, inputs, tmp_path):
    (tmp_path / "undisturbed").mkdir()
    arguments = inputs.command(case, tmp_path / "undisturbed", fasta=fasta, batch_tokens=100)
    code, printed = run(arguments)
    assert code == 0, printed
    expected, original, reported = contents(tmp_path / "undisturbed"), fasta.read_bytes(), []
    for change in CHANGES:
        folder = tmp_path / change.__name__
        folder.mkdir()
        arguments = inputs.command(case, folder, fasta=fasta, batch_tokens=100)
        process = start(arguments)
        wait_for_shard(process, folder)
        process.send_signal(signal.SIGSTOP)
        change(fasta)
        process.send_signal(signal.SIGCONT)
        printed = process.communicate(timeout=TIMEOUT)[0]
        fasta.write_bytes(original)
        if process.returncode == FAILED:
            assert "Traceback" not in printed and fasta.name in printed, printed
            reported.append(change.__name__)
        code, printed = run(arguments)
        assert is_finished(case, code, printed) or code == 0, printed
        assert contents(folder) == expected, change
    print(f"{case}: {len(CHANGES)} changes, reported: {', '.join(reported)}")
    assert reported == [change.__name__ for change in CHANGES]
