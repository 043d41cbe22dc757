"""`mlx-esm fold` as a command, and under kill -9."""

import csv
import json
import random
import signal
import subprocess
import sys

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from mlx_esm_hf.cli import app
from tests.jobs.models import write_folding_model
from tests.processes import ENVIRONMENT


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_folding_model(tmp_path_factory.mktemp("fold"))


def run(*arguments):
    result = CliRunner().invoke(app, ["fold", *map(str, arguments)])
    return result.exit_code, result.output.replace("\n", " ")


def test_a_folder_of_structures(model, tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nMKTAYI:GG\n>b\nMK<mask>\n>c\nacdef*\n")
    output = tmp_path / "out"
    code, said = run(tmp_path / "in.fasta", "--model", model, "--output", output, "--pictures", "--num-recycles", 0)
    assert code == 3 and "Left out:" in said and "'b' has <mask>" in said and "13 residues in" in said
    files = {f"{name}{end}" for name in "ac" for end in (".pdb", ".cif", ".npz", "_pae.json", "_pae.png", "_plddt.png")}
    assert files < {path.name for path in output.iterdir()}
    with open(output / "index.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["length"], row["chains"], row["recycles"]) for row in rows] == [
        ("a", "8", "2", "0"),
        ("c", "5", "1", "0"),
    ]


def test_one_file(model, tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nMKTAYI\n")
    output = tmp_path / "out.cif"
    assert run(tmp_path / "in.fasta", "--model", model, "--output", output, "--quiet") == (0, "")
    assert output.read_text().startswith("data_a\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fasta", "out.cif"]


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("out.ent", [], "Can't write `.ent`. Use .pdb or .cif, or a name without a suffix for a folder."),
        ("out.pdb", [], "contains one structure, but there are several proteins"),
        ("out.pdb", ["--pictures"], "Pictures are written into a folder"),
        ("out", ["--formats", "mol2"], "formats must be any of pdb, cif, got mol2"),
        ("out", ["--batch-tokens", "many"], "--batch-tokens must be auto or a positive integer"),
        ("out", ["--dtype", "float16"], "The folding trunk cannot be float16"),
        ("out", ["--num-recycles", "-1"], "'--num-recycles'"),
    ],
)
def test_user_errors(model, tmp_path, output, options, message):
    (tmp_path / "in.fasta").write_text(">a\nMKTAYI\n>b\nGG\n")
    code, said = run(tmp_path / "in.fasta", "--model", model, "--output", tmp_path / output, *options)
    assert code in (1, 2) and message in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


def test_help_has_an_example():
    code, said = run("--help")
    assert code == 0 and "mlx-esm fold proteins.fasta" in said


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    """Write 12 proteins; every third has two chains."""
    residues, path = random.Random(0), tmp_path_factory.mktemp("fasta") / "p.fasta"
    with path.open("w") as file:
        for i in range(12):
            sequence = "".join(residues.choices("ACDEFGHIKLMNPQRSTVWYX", k=residues.randint(30, 60)))
            file.write(f">p{i}\n{sequence[:20]}{':' if i % 3 == 0 else ''}{sequence[20:]}\n")
    return path


def arguments(fasta, model, output):
    return [fasta, "--model", model, "--output", output, "--batch-tokens", "64", "--num-recycles", "1"]


def without_seconds(folder):
    """Return {name: content} of all files, without the seconds that computing took."""
    found = {}
    for path in folder.iterdir():
        if path.name.startswith("shard-"):
            arrays = load_file(path)
            found[path.name] = {name: array.tobytes() for name, array in arrays.items() if "/seconds" not in name}
        elif path.name == "index.csv":
            with path.open(newline="") as file:
                found[path.name] = [{key: row[key] for key in row if key != "seconds"} for row in csv.DictReader(file)]
        elif path.name == "checksums.txt":  # checksums of the shards and the table depend on the seconds
            lines = path.read_text().splitlines()
            found[path.name] = [line for line in lines if not line.endswith((".safetensors", "index.csv"))]
        elif path.name == "manifest.json":
            manifest = json.loads(path.read_text())
            found[path.name] = manifest | {"settings": manifest["settings"] | {"memory": None}}
        else:
            found[path.name] = path.read_bytes()
    return found


def test_killed_run_resumes_with_identical_files(fasta, model, tmp_path):
    """The files equal those of an uninterrupted run, except for seconds, their checksums, and the memory limit."""
    assert run(*arguments(fasta, model, tmp_path / "whole"))[0] == 0
    output = tmp_path / "out"
    command = [sys.executable, "-m", "tests.abuse.child", "fold", *map(str, arguments(fasta, model, output))]
    killed = subprocess.run(command, stderr=subprocess.DEVNULL, env=ENVIRONMENT | {"KILL_BEFORE": r".*/\.p6\.pdb\..*"})
    assert killed.returncode == -signal.SIGKILL
    assert 4 <= len(list(output.glob("p*.pdb"))) < 12
    kept = {path: path.read_bytes() for path in sorted(output.glob("shard-????????.safetensors"))[:-1]}
    assert run(*arguments(fasta, model, output))[0] == 0
    assert without_seconds(output) == without_seconds(tmp_path / "whole")
    assert len(list(output.iterdir())) == 12 * 4 + len(list(output.glob("shard-*"))) + 3
    assert kept and all(path.read_bytes() == data for path, data in kept.items())  # not folded again
