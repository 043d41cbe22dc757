"""An input that changes while a run reads it: never a result of both."""

import os
import random
import signal

import pytest

from tests.abuse.command import FAILED, RESIDUES, TIMEOUT, contents, has_ended, run, start, wait_for_shard

CASES = ["embed .npz", "embed folder", "fill-mask .csv"]


def append(path):
    with open(path, "a") as file:
        file.write(">more\nMKTAYIAK\n")


def cut(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def rewrite(path):
    """In place: the same ids and lengths, other residues."""
    path.write_text(path.read_text().replace("A", "W"))


def replace(path):
    other = path.with_suffix(".other")
    other.write_text(path.read_text().replace("A", "W"))
    os.replace(other, path)


CHANGES = [append, cut, rewrite, replace, os.remove]


@pytest.fixture(scope="module")
def fasta(inputs):
    """More than is read at once."""
    rng, path = random.Random(0), inputs.fasta.with_name("many.fasta")
    sequences = ["".join(rng.choices(RESIDUES, k=100)) + "<mask>" for _ in range(400)]
    path.write_text("".join(f">p{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
    return path


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_input_that_changes(case, fasta, inputs, tmp_path):
    (tmp_path / "whole").mkdir()
    arguments = inputs.command(case, tmp_path / "whole", fasta=fasta, batch_tokens=100)
    code, said = run(arguments)
    assert code == 0, said
    expected, original, told = contents(tmp_path / "whole"), fasta.read_bytes(), []
    for change in CHANGES:
        folder = tmp_path / change.__name__
        folder.mkdir()
        arguments = inputs.command(case, folder, fasta=fasta, batch_tokens=100)
        process = start(arguments)
        wait_for_shard(process, folder)
        process.send_signal(signal.SIGSTOP)
        change(fasta)
        process.send_signal(signal.SIGCONT)
        said = process.communicate(timeout=TIMEOUT)[0]
        fasta.write_bytes(original)
        if process.returncode == FAILED:
            assert "Traceback" not in said and fasta.name in said, said
            told.append(change.__name__)
        code, said = run(arguments)
        assert has_ended(case, code, said) or code == 0, said
        assert contents(folder) == expected, change
    print(f"{case}: {len(CHANGES)} changes, told: {', '.join(told)}")
    assert told == [change.__name__ for change in CHANGES]
