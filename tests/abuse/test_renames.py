"""Kill whatever writes files at each rename, link and removal.

Afterwards the earlier files or the new ones are loaded, never a mixture, neither here nor by torch. The same command
then ends with the files of an undisturbed run, and nothing else is left.
"""

import json
import subprocess
import sys

import pytest

from tests.abuse.renames import CASES, write_inputs
from tests.processes import ENVIRONMENT, ROOT


@pytest.fixture(scope="module")
def rename_inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_kills_at_each_rename(case, rename_inputs, tmp_path):
    command = [sys.executable, "-m", "tests.abuse.renames", case, str(rename_inputs), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    print(f"{case}: {counts['kills']} kills, {len(counts['shortfalls'])} shortfalls")
    assert not counts["shortfalls"], counts["shortfalls"]
    assert counts["kills"] > 3
